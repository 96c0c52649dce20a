"""The same draft, distilled for the same steps on the same rows with each divergence, and what the target then accepts.

    python -m quire.distill.demo_prompts --out prompts
    python -m benchmarks.divergences --data prompts/train.jsonl --held-out prompts/held_out.jsonl

Every draft begins as the same cut of the target, and sees the same rows in the same order at the same rates; the
optimizer's steps do not depend on the scale of the loss. Rows are known text and the target's continuations, made and
scored once; there are none of the draft's own, which would differ from draft to draft. Acceptance is that of `quire
distill`: sampled, 1 - TVD at the temperature of the distillation; greedy, accepted tokens of a proposal. Give several
seeds to see what of it is chance.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from transformers import PreTrainedModel

from quire.core.config import embedded_model
from quire.distill.distillation import whole_logits
from quire.distill.divergences import DIVERGENCES, Divergence
from quire.distill.draft_init import Init, load_model, make_draft
from quire.distill.draft_trainer import DraftTrainer, Schedule
from quire.distill.held_out import HeldText, Measured, choose, make_held_texts, measure
from quire.distill.prompts import load_tokenizer, read_examples
from quire.distill.rounds import Mixture, RowMaker
from quire.distill.target_rows import Recorder
from quire.server.distil import OfflineEngines

CPU = torch.device("cpu")
UNDISTILLED = "none"
CALIBRATION_ROWS = 16


@dataclass(frozen=True, slots=True)
class Trial:
    """A target with its texts, and one seed's rows in `folder`."""

    model: str
    target: PreTrainedModel
    texts: list[HeldText]
    rows: RowMaker
    engines: OfflineEngines
    folder: Path
    args: argparse.Namespace

    def run(self, divergence: Divergence | None) -> Measured:
        """Acceptance after distillation with a divergence; None: before any."""
        draft = self._draft()
        if divergence is not None:
            self._train(draft, divergence)
        target, most, heat = whole_logits(self.target), self.args.draft_tokens, self.args.temperature
        return measure(self.texts, target, whole_logits(draft), most=most, temperature=heat, device=CPU)

    def _draft(self) -> PreTrainedModel:
        few = [torch.tensor([text.prompt + text.sampled]) for text in self.texts[:CALIBRATION_ROWS]]
        return make_draft(Init(self.args.init, self.args.mlp, shares_embedding=True), self.target, few)

    def _train(self, draft: PreTrainedModel, divergence: Divergence) -> None:
        args = self.args
        schedule = Schedule(steps=args.steps, batch_rows=args.batch_rows, round_rows=args.round_rows, rate=args.rate)
        trainer = DraftTrainer(
            draft, schedule, self.folder, divergence=divergence, temperature=args.temperature, seed=args.seed
        )

        def make_shard(number: int, path: Path) -> None:
            rows = self.rows.rows(number, schedule.rows_of(number), "", self.engines)
            vocab_size = self.target.get_output_embeddings().weight.shape[0]
            Recorder(whole_logits(self.target), vocab_size, args.kept, args.temperature, CPU).write(path, rows)

        while not trainer.done:  # every trainer after the first finds the rows in the folder
            for _ in trainer.train_round(make_shard, lambda: False):
                pass


def table(found: Iterable[tuple[str, Measured]]) -> str:
    """Markdown: sampled acceptance / accepted tokens of a greedy proposal, by domain."""
    lines: list[str] = []
    for name, measured in found:
        domains = list(measured.acceptance)
        if not lines:
            lines = ["| divergence | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
        cells = [f"{measured.acceptance[domain]:.3f} / {measured.accepted_length[domain]:.2f}" for domain in domains]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(embedded_model()), help="target")
    parser.add_argument("--data", type=Path, required=True, help="prompts to train on, as of quire distill")
    parser.add_argument("--held-out", type=Path, required=True, help="prompts to measure on")
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=DIVERGENCES)
    parser.add_argument("--init", default="layers:0,1")
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--round-rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--texts", type=int, default=64, help="held-out texts")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def make_trial(args: argparse.Namespace, folder: Path) -> Trial:
    """Everything but training, for the seed in `args`."""
    target, tokenizer = load_model(args.model, "auto").requires_grad_(False), load_tokenizer(args.model)
    vocab_size = target.get_output_embeddings().weight.shape[0]
    train, held = (read_examples(path, tokenizer, vocab_size) for path in (args.data, args.held_out))
    engines = OfflineEngines({"device": "cpu", "max_model_len": args.length}, args.model)
    rows = RowMaker(train, Mixture(0.5, 0.5, 0.0), args.length, (args.temperature, 0.0), args.seed, args.model)
    texts = make_held_texts(
        folder / "held_out.json", choose(held, args.texts), args.model, engines, length=args.length,
        new_tokens=args.length // 2, temperature=args.temperature, seed=args.seed,
    )  # fmt: skip
    return Trial(args.model, target, texts, rows, engines, folder, args)


def main() -> None:
    """Run and print, seed by seed."""
    args, console = parse(), Console()
    for seed in args.seeds:
        args.seed = seed
        with TemporaryDirectory() as folder:
            trial, found = make_trial(args, Path(folder)), []
            kinds: list[Divergence | None] = [None, *args.divergences]
            for kind in kinds:
                torch.manual_seed(seed)
                started = time.monotonic()
                found.append((kind or UNDISTILLED, trial.run(kind)))
                console.log(f"seed {seed}, {kind or UNDISTILLED}: {time.monotonic() - started:.0f} s")
        console.print(f"\nseed {seed}, {args.steps} steps; sampled / greedy of {args.draft_tokens}\n")
        console.print(table(found), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
