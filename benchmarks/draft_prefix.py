"""What a draft model's cache saves where prompts share beginnings, as ratios within one run.

    python -m benchmarks.draft_prefix [--preset 0.1b] [--draft DIR] [--shared 2000] [--rounds 8] [--answer 48]

The same requests go, one after another, to three engines in turns, all with a prefix cache: without drafts, with a
draft model that is made to forget between requests, and with one that is not. "system prompt": questions after the same
`--shared` tokens. "dialogue": all that was said before, and one more question. Answers are greedy and of a set length;
a request's time is all from its submission to its end.
"""

import argparse
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.intervals import median_interval
from benchmarks.stepping import load
from benchmarks.upscale import PRESETS, cached
from benchmarks.workloads import request
from quire.core.config import embedded_model
from quire.core.messages import Failed, Tokens, single_events
from quire.core.request import SeedSource
from quire.distill.corpus import documented_functions, is_held_out, standard_library
from quire.engine.engine import Engine
from quire.evaluation.material import Material
from quire.scheduler.loop import EngineLoop
from quire.server.text import Tokenizer

Turns = Generator[list[int], list[int], None]
"""Gives prompts, takes what was said."""


@dataclass
class Side:
    """An engine, and what each request took, the first one left out."""

    loop: EngineLoop
    forgets: bool = False
    seconds: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    """Tokens that the draft took from its cache, and those that it computed."""
    computed: list[int] = field(default_factory=list)

    def serve(self, prompt: list[int], answer: int) -> list[int]:
        """What is said."""
        if self.forgets:
            assert isinstance(self.loop.engine, Engine) and self.loop.engine._speculation is not None
            self.loop.engine._speculation.drafter.clear()
        before, said, started = self.loop.stats().speculation, list[int](), time.perf_counter()
        self.loop.submit(request(prompt, answer, 0.0, SeedSource()))
        while self.loop.has_work:
            for event in single_events(self.loop.step().events):
                assert not isinstance(event, Failed), event.error.message
                if isinstance(event, Tokens):
                    said += event.token_ids
        self.seconds.append(time.perf_counter() - started)
        now = self.loop.stats().speculation
        self.cached.append(now.cached_tokens - before.cached_tokens)
        self.computed.append(now.computed_tokens - before.computed_tokens)
        return said


class Workloads:
    """Prompts in text that was held out when quire-mini was trained."""

    def __init__(self, turns: int) -> None:
        self._tokenizer, self._turns = Tokenizer.load(str(embedded_model())), turns
        files = [file for file in standard_library() if is_held_out(file.path)]
        self._questions = [{"role": "user", "content": asked} for asked, _ in documented_functions(files)]

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.encode(self._tokenizer.chat_prompt(messages), add_special_tokens=False)

    def system_prompt(self, shared: int) -> Turns:
        """Questions after the same text."""
        material = Material(self._tokenizer, "code")
        text = self._tokenizer.decode(material.filler(np.random.default_rng(0), shared).ids)
        for question in self._questions[: self._turns]:
            yield self._prompt([{"role": "system", "content": text}, question])

    def dialogue(self) -> Turns:
        """One conversation."""
        messages: list[dict[str, str]] = []
        for question in self._questions[: self._turns]:
            messages.append(question)
            said = yield self._prompt(messages)
            messages.append({"role": "assistant", "content": self._tokenizer.decode(said)})


def measure(name: str, turns: Turns, loops: dict[str, EngineLoop], answer: int) -> Table:
    """All turns on all engines."""
    sides = {side: Side(loop, side == "draft forgets") for side, loop in loops.items()}
    order, equal, lengths = [*sides.values()], list[bool](), list[int]()
    prompt: list[int] | None = next(turns)
    while prompt is not None:
        said = [side.serve(prompt, answer) for side in order]
        equal.append(all(one == said[0] for one in said))
        lengths.append(len(prompt))
        order = order[1:] + order[:1]
        try:
            prompt = turns.send(said[0])
        except StopIteration:
            prompt = None
    title = f"{name}: prompts of {min(lengths)} to {max(lengths)} tokens, texts equal in {np.mean(equal):.0%}"
    table = Table("", "tokens/s", "x no drafts", "x draft forgets (95 %)", "from cache", "computed", title=title)
    for label, side in sides.items():
        ratios = [[a / b for a, b in zip(sides[base].seconds[1:], side.seconds[1:], strict=True)] for base in
                  ("no drafts", "draft forgets")]  # fmt: skip
        low, high = median_interval(ratios[1])
        table.add_row(
            label,
            f"{answer / statistics.median(side.seconds[1:]):.0f}",
            f"{statistics.median(ratios[0]):.2f}x",
            f"{statistics.median(ratios[1]):.2f}x ({low:.2f}-{high:.2f})",
            f"{statistics.mean(side.cached[1:]):.0f}",
            f"{statistics.mean(side.computed[1:]):.0f}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="0.1b", help="size of the target, quire-mini enlarged")
    parser.add_argument("--draft", type=Path, default=embedded_model() / "draft", help="folder of the draft model")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--shared", type=int, default=2000, help="tokens of the system prompt")
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=8, help="requests of a workload, and one to warm up")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    mini, console = embedded_model(), Console(width=120)
    settings = {"dtype": args.dtype, "prefix_cache": True, "max_num_seqs": 1}
    drafts = {"draft": str(args.draft), "draft_tokens": args.draft_tokens}
    model = str(cached(mini, args.preset))
    loops = {"no drafts": load(model, **settings)}
    loops |= {label: load(model, **settings | drafts) for label in ("draft forgets", "draft remembers")}
    workloads = Workloads(args.rounds + 1)
    console.print(measure("system prompt", workloads.system_prompt(args.shared), loops, args.answer))
    console.print(measure("dialogue", workloads.dialogue(), loops, args.answer))


if __name__ == "__main__":
    main()
