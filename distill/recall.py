"""How well a model looks back: exact recall and copying by distance, and the loss on held-out code.

Recall is exact when every token of the value is the most likely one given the true tokens before it, which is the same
as greedy generation giving the whole value. Run as `python -m quire.distill.recall MODEL_DIR` for the table.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .card import replace_measured
from .corpus import Corpus, build_corpus, standard_library
from .samples import Binding, SampleMaker
from .vocabulary import load_tokenizer

Logits = Callable[[Tensor, int], Tensor]  # ids [B, T], n -> logits of the last n positions [B, n, V]

DISTANCES = (16, 64, 256, 1000, 2000, 3500)
KEYS = 8  # bindings in a multi-key trial


@dataclass(slots=True)
class Report:
    """What `measure` found; accuracies in 0..1 by distance in tokens."""

    loss: float
    single: dict[int, float] = field(default_factory=dict)
    multi: dict[int, float] = field(default_factory=dict)
    copying: dict[int, float] = field(default_factory=dict)
    random_copying: dict[int, float] = field(default_factory=dict)
    trials: int = 0

    def table(self) -> str:
        """The report as a Markdown table."""
        lines = [
            "| distance (tokens) | recall, one binding | recall, one of eight | copying code | copying random tokens |",
            "|---|---|---|---|---|",
        ]
        for distance in self.single:
            cells = [self.single, self.multi, self.copying, self.random_copying]
            shown = [f"{100 * c[distance]:.0f}%" if distance in c else "-" for c in cells]
            lines.append(f"| {distance} | " + " | ".join(shown) + " |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Loss and table, as the model card shows them."""
        counts = f"{self.trials} trials a cell for recall, a quarter for copying"
        return f"Held-out loss {self.loss:.3f} nats per token; {counts}.\n\n{self.table()}"

    def score(self) -> float:
        """One number to choose a checkpoint by: recall up to what few trials can tell from perfect, then the loss."""
        recall = list(self.single.values()) + list(self.multi.values())
        return sum(min(r, 0.9) for r in recall) / max(1, len(recall)) - 0.05 * self.loss


class RecallTrials:
    """Makes trials from held-out code and scores a model on them; the same seed gives the same trials."""

    def __init__(self, corpus: Corpus, maker: SampleMaker, seed: int = 1) -> None:
        self.corpus = corpus
        self.maker = maker
        self.seed = seed

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        """`length` tokens of held-out code from the start of a line on."""
        source = self.corpus.held_out
        start = int(rng.integers(0, max(1, len(source) - length - 200)))
        starts = self.maker.line_starts(source[start : start + 200].tolist())
        start += int(starts[0]) if len(starts) else 0
        ids = source[start : start + length].tolist()
        return ids + source[: length - len(ids)].tolist()

    def recall_trial(self, rng: np.random.Generator, distance: int, keys: int) -> tuple[list[int], int]:
        """Prompt ending in `name =` followed by the value, and the value's length; one of `keys` bindings is asked.

        `distance` counts the tokens from the value's first token to the place where it must be written again.
        """
        bound = self.maker.bindings(rng, keys)
        asked: Binding = bound[int(rng.integers(keys))]
        before = self.filler(rng, 32)
        lines = [b.first().ids for b in bound]
        order = bound.index(asked)
        head = before + [t for line in lines[:order] for t in line] + asked.head
        after = asked.value + asked.end + [t for line in lines[order + 1 :] for t in line]
        gap = max(0, distance - len(after) - len(asked.head))
        prompt = head + after + self.filler(rng, gap) + self.maker.newline + asked.head
        return prompt + asked.value, len(asked.value)

    def copy_trial(self, rng: np.random.Generator, distance: int, random: bool) -> tuple[list[int], int]:
        """A block, filler, the block again; the last tokens of the block (all but four) must be copied."""
        count = min(24, distance)
        vocab = len(self.corpus.ends_line)
        block = rng.integers(3, vocab, count).tolist() if random else self.filler(rng, count)
        gap = max(0, distance - count)
        return self.filler(rng, 32) + block + self.filler(rng, gap) + block, count - 4

    def exact(self, logits: Logits, trials: list[tuple[list[int], int]], whole: bool) -> float:
        """Share of trials (`whole`) or of tokens whose target tokens are all the most likely ones."""
        right: list[float] = []
        for ids, count in trials:
            tokens = torch.tensor([ids])
            best = logits(tokens[:, :-1], count)[0].argmax(-1).cpu()
            hits = (best == tokens[0, -count:]).float()
            right.append(float(hits.all()) if whole else float(hits.mean()))
        return sum(right) / len(right)

    def measure(self, logits: Logits, trials: int, distances: tuple[int, ...], windows: int) -> Report:
        """The whole report: `trials` per distance and kind, loss over `windows` windows of 512 held-out tokens."""
        report = Report(self.held_out_loss(logits, windows), trials=trials)
        for distance in distances:
            rng = np.random.default_rng((self.seed, distance))
            single = [self.recall_trial(rng, distance, 1) for _ in range(trials)]
            report.single[distance] = self.exact(logits, single, whole=True)
            if distance >= 100:
                multi = [self.recall_trial(rng, distance, KEYS) for _ in range(trials)]
                report.multi[distance] = self.exact(logits, multi, whole=True)
            few = max(1, trials // 4)
            copies = [self.copy_trial(rng, distance, random=False) for _ in range(few)]
            report.copying[distance] = self.exact(logits, copies, whole=False)
            randoms = [self.copy_trial(rng, distance, random=True) for _ in range(few)]
            report.random_copying[distance] = self.exact(logits, randoms, whole=False)
        return report

    def held_out_loss(self, logits: Logits, windows: int) -> float:
        """Mean next-token loss in nats over evenly spread windows of 512 tokens of held-out code."""
        source = self.corpus.held_out
        length = min(512, len(source) - 2)
        total = 0.0
        for start in np.linspace(0, len(source) - length - 1, windows).astype(int):
            ids = torch.from_numpy(source[start : start + length + 1].astype(np.int64))[None]
            out = logits(ids[:, :-1], length)[0].float().cpu()
            total += torch.nn.functional.cross_entropy(out, ids[0, 1:]).item()
        return total / windows


def transformers_logits(directory: Path, device: str) -> Logits:
    """Logits of a checkpoint as the transformers library computes them, in bfloat16."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    model.to(torch.device(device))

    @torch.inference_mode()
    def logits(ids: Tensor, last: int) -> Tensor:
        return model(input_ids=ids.to(device), use_cache=False, logits_to_keep=last).logits

    return logits


def main() -> None:
    """Print the report of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--trials", type=int, default=100, help="trials per distance")
    parser.add_argument("--windows", type=int, default=300, help="held-out windows of 512 tokens")
    parser.add_argument("--distances", type=int, nargs="+", default=list(DISTANCES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print numbers as JSON instead of a table")
    parser.add_argument("--card", action="store_true", help="put the result into the model's README.md")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    corpus = build_corpus(tokenizer, standard_library())
    trials = RecallTrials(corpus, SampleMaker(corpus, tokenizer), args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = trials.measure(transformers_logits(args.model, device), args.trials, tuple(args.distances), args.windows)
    if args.json:
        print(json.dumps({"loss": report.loss, "single": report.single, "multi": report.multi}))
    else:
        print(report.summary())
    if args.card:
        replace_measured(args.model / "README.md", report.summary())


if __name__ == "__main__":
    main()
