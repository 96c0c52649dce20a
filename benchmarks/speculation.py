"""Speculative decoding: tokens per second relative to none, and why, within one run.

    python -m benchmarks.speculation [--model DIR] [--drafters ngram DIR layerskip:4] [--lengths 2 4 8 auto]
        [--batches 1 4 16 64] [--workloads code edit chat] [--temperature 0] [--rounds 5] [--quick] [--json FILE]

Without --model the target is quire-mini enlarged (`benchmarks/upscale.py`), made once and kept in the cache folder: it
costs what a model of --preset costs. Then quire-mini itself is a drafter that is nearly always right, the upper bound.
Greedily it soon repeats itself, which flatters n-grams: see --temperature 0.8 too, or take a model of your own.

An engine that drafts is loaded per drafter and length, beside one that does not (`--draft none`). They run the batch
of prompts side by side, in turns of a few steps, because the machine's own pace changes within seconds; the first round
is not counted. What counts are the steps at whose beginning all sequences generate, so prompts and the thinning out at
the end do not. A round gives one ratio of tokens per second. It serves eight prompts at least, batch after batch: how
much can be drafted differs from text to text. Above temperature 0 the two sides say different things where a draft
model has a say, so a round compares samples of texts, not text by text.

* x off: generated tokens per second, relative to no drafter: the median of the rounds' ratios. Behind it, where this
  lies with a probability of 95 % (bootstrap over the rounds), and how that is to `--floor`: above, below, or across it.
* per draft: accepted tokens of a draft and the one that the target adds, over steps with drafts.
* accepted: share of the drafts whose 1st, 2nd, ... token was accepted; where drafts are of unequal lengths, a short one
  counts as not accepted at the places it lacks.
* asked: mean length asked for per sequence and step, no draft counting as 0.
* forward: time of the target's forward pass in a step, relative to no speculation: what rows of drafts add.
* draft: share of the steps' time spent on proposing. rest: the share that is neither that nor the target's forward pass
  (planning, sampling, verifying, committing), with speculation and without. With a length that is a number all steps
  verify, and it is what verification costs beyond the forward pass of as many rows.
* equal: share of tokens equal to those without speculation, where they must be (greedy), ties of rounding aside.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.intervals import median_interval, verdict
from benchmarks.steady import Steady, Watcher, difference
from benchmarks.stepping import load
from benchmarks.upscale import PRESETS, cached
from benchmarks.workloads import WORKLOADS, Workloads, has_chat, request
from quire.core.config import embedded_model
from quire.core.errors import QuireError
from quire.core.messages import EngineInfo
from quire.core.request import SeedSource
from quire.core.speculation import MAX_DRAFT_TOKENS, SpeculationCounts
from quire.scheduler.loop import EngineLoop
from quire.server.drafting import draft_settings, parse_draft_tokens
from quire.server.text import Tokenizer

_SLICE = 0.05
"""Seconds of a turn."""
_LEAST_PROMPTS = 8
"""Of a round."""


Prompts = dict[tuple[str, int], list[list[list[int]]]]
"""Batches of token ids by workload and batch size."""


@dataclass(frozen=True, slots=True)
class Round:
    """One batch with a drafter and without."""

    on: Steady
    off: Steady
    counts: SpeculationCounts
    """Of the run with the drafter, all its steps."""
    equal: float
    """Share of tokens equal."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A workload and a batch size on one engine."""

    drafter: str
    length: str
    workload: str
    batch: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Tokens per second with the drafter by those without, of each round."""
        return [one.on.rate / one.off.rate for one in self.rounds]

    @property
    def speedup(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the median lies with a probability of 95 %."""
        return median_interval(self.ratios)

    @property
    def rate(self) -> float:
        """Tokens per second with speculation."""
        return statistics.median(one.on.rate for one in self.rounds)

    @property
    def per_draft(self) -> float:
        """Accepted tokens of a draft, and one; 1 if nothing was drafted."""
        drafts = sum(one.counts.drafts for one in self.rounds)
        return 1 + sum(one.counts.accepted_tokens for one in self.rounds) / max(1, drafts)

    @property
    def accepted(self) -> list[float]:
        """By position, the share of the drafts whose token was accepted."""
        drafts = max(1, sum(one.counts.drafts for one in self.rounds))
        positions = itertools.zip_longest(*(one.counts.accepted_per_position for one in self.rounds), fillvalue=0)
        return [sum(position) / drafts for position in positions]

    @property
    def asked(self) -> float:
        """Mean length asked for, none included."""
        lengths = [sum(one) for one in itertools.zip_longest(*(r.counts.lengths for r in self.rounds), fillvalue=0)]
        return sum(length * times for length, times in enumerate(lengths)) / max(1, sum(lengths))


@dataclass(frozen=True, slots=True)
class Engines:
    """What is compared."""

    on: EngineLoop
    """Has a drafter."""
    off: EngineLoop
    """Has none."""


class Run:
    """A batch on its way from the first prompt to the last token."""

    def __init__(
        self, loop: EngineLoop, prompts: Sequence[list[int]], args: argparse.Namespace, steady: Steady
    ) -> None:
        """steady: sums to add to."""
        self._loop = loop
        self._watcher = Watcher(len(prompts), loop.stats().speculation, steady)
        seeds = SeedSource()
        self._requests = [request(one, args.output, args.temperature, seeds) for one in prompts]
        for one in self._requests:
            loop.submit(one)

    def advance(self) -> bool:
        """Run on for `_SLICE` seconds; whether there is more to do."""
        end = time.perf_counter() + _SLICE
        while self._loop.has_work and (started := time.perf_counter()) < end:
            report = self._loop.step()
            self._watcher.watch(report, time.perf_counter() - started)
        if self._loop.scheduler.speculation is not None:
            self._loop.scheduler.speculation.pause()
        return self._loop.has_work

    def said(self) -> list[list[int]]:
        """Tokens of each request."""
        return [self._watcher.tokens[one.id] for one in self._requests]


def measure(engines: Engines, cell: Cell, batches: Sequence[Sequence[list[int]]], args: argparse.Namespace) -> None:
    """Fill the cell with rounds of these batches."""
    for number in range(args.rounds + 1):
        one = a_round(engines, batches, args, drafter_first=bool(number % 2))
        if not (one.on.tokens and one.off.tokens):
            sys.exit("error: some answers ended before all prompts were computed: ask for a longer --output")
        if number:  # the first one warms up: kernels, prefixes, measured acceptance
            cell.rounds.append(one)


def a_round(
    engines: Engines, batches: Sequence[Sequence[list[int]]], args: argparse.Namespace, drafter_first: bool
) -> Round:
    """The batches, one after the other, each side by side."""
    before, on, off, equal = engines.on.stats().speculation, Steady(), Steady(), list[float]()
    for prompts in batches:
        sides = [(engines.on, on), (engines.off, off)]
        going = runs = [Run(loop, prompts, args, sums) for loop, sums in (sides if drafter_first else sides[::-1])]
        while going:
            going = [one for one in going if one.advance()]
        equal.append(agreement(*(one.said() for one in runs)))
    return Round(on, off, difference(engines.on.stats().speculation, before), statistics.mean(equal))


def agreement(said: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> float:
    """Mean share of tokens that are equal."""
    return statistics.mean(
        sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[1]) for pair in zip(said, plain, strict=True)
    )


def draw(args: argparse.Namespace, model: str, console: Console) -> Prompts:
    """The prompts of each workload and batch size, the same for all drafters."""
    tokenizer = Tokenizer.load(model)
    source = Workloads(tokenizer)
    kinds = [kind for kind in args.workloads if kind != "chat" or has_chat(tokenizer)]
    if len(kinds) < len(args.workloads):
        console.print("chat: the model has no template")
    return {
        (kind, batch): [
            [source.take(kind, args.prompt) for _ in range(batch)] for _ in range(-(-_LEAST_PROMPTS // batch))
        ]
        for kind in kinds
        for batch in args.batches
    }


def engine_settings(args: argparse.Namespace, prompts: Prompts) -> dict[str, object]:
    """Of both engines."""
    return {
        "dtype": args.dtype,
        "prefix_cache": True,  # prompts are not what is measured
        "max_num_seqs": max(args.batches),
        "max_model_len": max(len(one) for batches in prompts.values() for batch in batches for one in batch)
        + args.output,
    }


def cells(
    args: argparse.Namespace,
    model: str,
    off: EngineLoop,
    engine: tuple[str, str],
    prompts: Prompts,
    console: Console,
) -> Iterator[Cell]:
    """All of one engine (drafter, length), as they are measured; nothing if it cannot draft so."""
    drafter, length = engine
    try:
        on = load(model, **engine_settings(args, prompts) | draft_settings(drafter, length))
    except QuireError as error:
        console.print(f"{drafter}: {error.message}")
        return
    info: EngineInfo = on.engine.info
    if info.draft is None:
        console.print(f"{drafter}: the engine does not draft")
        return
    console.print(f"{drafter}, length {length}: {info.device}, {info.dtype}, {msgspec.to_builtins(info.draft)}")
    for (workload, batch), batches in prompts.items():
        cell = Cell(drafter, length, workload, batch)
        measure(Engines(on, off), cell, batches, args)
        yield cell


def show(console: Console, found: Sequence[Cell], floor: float, greedy: bool) -> None:
    """A row per cell."""
    names = ("workload", "batch", "length", "x off", f"95 %, to {floor}", "tokens/s", "per draft", "accepted", "asked")
    table = Table(*names, "forward", "draft", "rest", "equal", title=found[0].drafter)
    for cell in found:
        on, off = ([getattr(one, name) for one in cell.rounds] for name in ("on", "off"))
        table.add_row(
            cell.workload,
            str(cell.batch),
            cell.length,
            f"{cell.speedup:.3f}x",
            f"{cell.interval[0]:.3f}-{cell.interval[1]:.3f} {verdict(cell.interval, floor)}",
            f"{cell.rate:,.0f}",
            f"{cell.per_draft:.2f}",
            " ".join(f"{share:.0%}" for share in cell.accepted[:5]),
            f"{cell.asked:.1f}",
            f"{statistics.median(one.on.forward / one.off.forward for one in cell.rounds):.2f}x",
            f"{statistics.median(one.draft_share for one in on):.0%}",
            " / ".join(f"{statistics.median(one.rest_share for one in side):.0%}" for side in (on, off)),
            f"{statistics.mean(one.equal for one in cell.rounds):.1%}" if greedy else "",
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    """The command line, with --quick applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: quire-mini, enlarged")
    parser.add_argument("--preset", choices=PRESETS, default="0.5b", help="size of the enlarged model")
    parser.add_argument("--drafters", nargs="+", help="what --draft of quire serve takes; default: all that fit")
    parser.add_argument(
        "--lengths", nargs="+", default=["2", "4", "8", "auto"], help=f"auto or 1 to {MAX_DRAFT_TOKENS}"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of code in a prompt")
    parser.add_argument("--output", type=int, default=96, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--floor", type=float, default=0.97, help="x off that no cell should be below")
    parser.add_argument("--quick", action="store_true", help="a small target, few cells, one round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        quick = {"preset": "0.1b", "lengths": ["4", "auto"], "batches": [1, 8], "output": 48, "rounds": 1}
        for name, value in quick.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    return args


def default_drafters(own: bool) -> list[str]:
    """N-grams, the draft that comes with quire-mini, and quire-mini itself where the target is an enlarged one."""
    mini = embedded_model()
    drafts = [mini / "draft"] if (mini / "draft").is_dir() else []
    return ["ngram", *map(str, [*drafts, mini] if own else drafts)]


def main() -> None:
    """Measure and print, a table per drafter."""
    args = arguments()
    console = Console(width=140)
    try:
        for length in args.lengths:
            parse_draft_tokens(length)
    except QuireError as error:
        sys.exit(f"error: {error.message}")
    model = args.model or str(cached(embedded_model(), args.preset))
    prompts = draw(args, model, console)
    off = load(model, **engine_settings(args, prompts))
    found: list[Cell] = []
    for drafter in args.drafters or default_drafters(own=args.model is None):
        rows = [
            cell for length in args.lengths for cell in cells(args, model, off, (drafter, length), prompts, console)
        ]
        if rows:
            show(console, rows, args.floor, args.temperature == 0)
        found += rows
    if args.json:
        derived = ("speedup", "interval", "rate", "per_draft", "accepted", "asked")
        figures = [asdict(cell) | {name: getattr(cell, name) for name in derived} for cell in found]
        content = {"arguments": vars(args), "model": model, "cells": figures}
        args.json.write_bytes(msgspec.json.encode(content, enc_hook=str))
    if not found:
        sys.exit("error: no drafter to measure")


if __name__ == "__main__":
    main()
