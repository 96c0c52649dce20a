"""Trains the embedded demonstration model: `python -m quire.distill.pretrain --out DIR` (CPU or one GPU).

The data are the standard library's own sources and synthetic recall text; the weights start with a wired circuit that
looks back (see `wiring`). Everything a run needs is in its folder: `state.pt` to go on from (found automatically),
`tokenizer.json`, `log.jsonl`, and `model/`, the best checkpoint so far. Batches are a function of the step, so a run
that was interrupted ends with the same weights as one that was not.
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .card import model_card
from .corpus import Corpus, build_corpus, is_held_out, standard_library
from .export import export
from .network import Decoder, Shape
from .optimizer import MaskedMuon, Rates
from .recall import RecallTrials, Report
from .samples import Mixture, SampleMaker
from .vocabulary import load_tokenizer, train_tokenizer
from .wiring import Layout, trainable_masks, wire

LENGTHS = ((512, 0.60), (1024, 0.15), (2048, 0.20), (4096, 0.05))  # share of the steps at each row length
MIXTURE = Mixture(recall=0.32, copy=0.08, random_copy=0.04, chat=0.06)


@dataclass(frozen=True, slots=True)
class Settings:
    """One training run."""

    out: Path
    tokens: int  # of training in all
    minutes: float = float("inf")  # the schedule ends by then even with fewer tokens; such a run is not repeatable
    micro_tokens: int = 4096  # tokens in one forward pass
    batch_tokens: int = 4096  # tokens per step from `grow_at` on; one micro-batch before
    grow_at: float = 0.4  # share of the run
    warmup: float = 0.01  # share of the run
    decay: float = 0.45  # share of the run, at its end, in which the rate falls linearly
    last_rate: float = 0.02  # of the peak, at the end
    rate_scale: float = 1.0
    seed: int = 0
    save_minutes: float = 5.0
    eval_tokens: int = 750_000
    eval_trials: int = 12
    compiled: bool = True
    device: str = "cpu"
    files: int | None = None  # limit of source files, for tests
    mixture: Mixture = MIXTURE


@dataclass(slots=True)
class Progress:
    """What moves on during a run, besides weights and optimizer."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    best: float = float("-inf")
    next_eval: int = 0


def rate_at(settings: Settings, done: float) -> float:
    """Schedule: warm up, stay, fall linearly; `done` is the share of the run done, result a share of the peak."""
    if done < settings.warmup:
        return settings.rate_scale * max(0.05, done / settings.warmup)
    left = (1.0 - done) / settings.decay
    return settings.rate_scale * max(settings.last_rate, min(1.0, left))


def length_at(settings: Settings, step: int, context: int) -> int:
    """Row length of a step, drawn by seed and step."""
    draw = np.random.default_rng((settings.seed, 1, step)).random()
    limit = min(settings.micro_tokens, context)
    for length, share in LENGTHS:
        if draw < share:
            return min(length, limit)
        draw -= share
    return min(LENGTHS[0][0], limit)


class Trainer:
    """Owns model, optimizer and progress of one run."""

    def __init__(self, settings: Settings, shape: Shape, tokenizer: Tokenizer, corpus: Corpus) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.maker = SampleMaker(corpus, tokenizer, settings.seed)
        self.trials = RecallTrials(corpus, self.maker)
        self.model = Decoder(shape)
        layout = Layout()
        wire(self.model, layout, settings.seed)
        self.model.to(settings.device)
        masks = {n: m.to(settings.device) for n, m in trainable_masks(self.model, layout).items()}
        for name, mask in masks.items():
            if not mask.any():
                self.model.get_parameter(name).requires_grad_(False)
        self.optimizer = MaskedMuon(self.model, masks, Rates())
        self.progress = Progress()
        self.stopping = False
        self.loss = self._loss_function()

    def _loss_function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss, compiled if asked; where compiling fails the plain function runs."""
        if not self.settings.compiled:
            return self.model.loss
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = 2 * len(LENGTHS)
        return torch.compile(self.model.loss, dynamic=False)

    def batch(self, length: int) -> tuple[Tensor, Tensor]:
        """The next micro-batch: ids [B, length + 1], weights [B, length]."""
        count = self.settings.micro_tokens // length
        first = self.progress.rows
        rows = [self.maker.row(first + i, length, self.settings.mixture) for i in range(count)]
        self.progress.rows += count
        ids = torch.from_numpy(np.stack([r[0] for r in rows]))
        weights = torch.from_numpy(np.stack([r[1] for r in rows]))
        return ids.to(self.settings.device), weights.to(self.settings.device)

    def done(self) -> float:
        """Share of the run that is done, by tokens or by time, whichever is further."""
        settings, progress = self.settings, self.progress
        return max(progress.tokens / settings.tokens, progress.seconds / 60 / settings.minutes)

    def step(self) -> float:
        """One optimizer step; returns the mean loss of its micro-batches."""
        settings, progress = self.settings, self.progress
        done = self.done()
        micros = max(1, settings.batch_tokens // settings.micro_tokens) if done >= settings.grow_at else 1
        total = 0.0
        for micro in range(micros):
            length = length_at(settings, progress.step * 64 + micro, self.model.shape.context)
            loss = self.loss(*self.batch(length)) / micros
            loss.backward()
            total += loss.item()
            progress.tokens += settings.micro_tokens // length * length
        self.optimizer.step(rate_at(settings, done))
        progress.step += 1
        return total

    def evaluate(self) -> Report:
        """A small report; the model so far is exported if it is the best by recall, then loss."""

        report = self.trials.measure(self.model.last_logits, self.settings.eval_trials, (256, 1000), windows=32)
        if report.score() > self.progress.best:
            self.progress.best = report.score()
            count = sum(p.numel() for p in self.model.parameters())
            card = model_card(self.model.shape, count, self.progress.tokens, report.summary())
            export(self.model, self.tokenizer, self.settings.out / "model", card)
        return report

    def save(self) -> None:
        """Write `state.pt`, whole or not at all."""
        path = self.settings.out / "state.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self) -> bool:
        """Go on from `state.pt` if there is one."""
        path = self.settings.out / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True

    def run(self, max_steps: int | None = None) -> None:
        """Train until the tokens (or `max_steps` more steps) are done, with logs, saves and evaluations."""
        settings, progress = self.settings, self.progress
        begun, saved, steps = time.monotonic() - progress.seconds, time.monotonic(), 0
        smooth: float | None = None
        while self.done() < 1.0 and steps != max_steps and not self.stopping:
            if progress.tokens >= progress.next_eval:
                self._log(smooth, self.evaluate())
                progress.next_eval = progress.tokens + settings.eval_tokens
            loss = self.step()
            steps += 1
            smooth = loss if smooth is None else 0.97 * smooth + 0.03 * loss
            progress.seconds = time.monotonic() - begun
            if progress.step % 20 == 0:
                self._log(smooth)
            if time.monotonic() - saved > 60 * settings.save_minutes:
                self.save()
                saved = time.monotonic()
        if self.done() >= 1.0:
            self._log(smooth, self.evaluate())
        self.save()

    def stop(self, *_: object) -> None:
        """Let `run` save and return after the present step; fits as a signal handler."""
        self.stopping = True

    def _log(self, loss: float | None, report: Report | None = None) -> None:
        """One line for people and one for `log.jsonl`."""
        progress = self.progress
        speed = progress.tokens / progress.seconds if progress.seconds else 0.0
        eta = progress.seconds / 60 * (1.0 / self.done() - 1.0) if progress.seconds else 0.0
        line: dict[str, object] = {"step": progress.step, "tokens": progress.tokens, "loss": loss}
        line["tokens_per_s"] = speed
        text = f"step {progress.step} tokens {progress.tokens / 1e6:.2f}M loss {loss or 0.0:.3f} {speed:.0f} tok/s"
        text += f" eta {eta:.0f} min"
        if report is not None:
            line |= {"held_out": report.loss, "single": report.single, "multi": report.multi}
            line |= {"copying": report.copying, "random_copying": report.random_copying}
            text += f"\n  held-out {report.loss:.3f} recall {report.single} of eight {report.multi}"
            text += f" copying {report.copying} random {report.random_copying}"
        print(text, flush=True)
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def prepare(settings: Settings, vocab_size: int) -> tuple[Tokenizer, Corpus]:
    """Tokenizer (trained, unless the run's folder has one) and corpus."""
    settings.out.mkdir(parents=True, exist_ok=True)
    files = standard_library(settings.files)
    path = settings.out / "tokenizer.json"
    if not path.exists():
        texts = (f.text for f in files if not is_held_out(f.path))
        train_tokenizer(texts, vocab_size).save(str(path))
    tokenizer = load_tokenizer(settings.out)
    return tokenizer, build_corpus(tokenizer, files)


def parse() -> Settings:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--tokens", type=float, default=15e6, help="training tokens in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end the schedule by this time")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens in one forward pass")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step in the later part")
    parser.add_argument("--eval-tokens", type=float, default=750_000, help="tokens between evaluations")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="minutes between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(
        out=args.out,
        tokens=int(args.tokens),
        minutes=args.minutes,
        micro_tokens=args.micro_tokens,
        batch_tokens=args.batch_tokens,
        rate_scale=args.rate_scale,
        seed=args.seed,
        save_minutes=args.save_minutes,
        eval_tokens=int(args.eval_tokens),
        compiled=not args.no_compile,
        device=device,
    )


def main() -> None:
    """Train, or go on training, as the command line says."""
    settings = parse()
    shape = Shape()
    tokenizer, corpus = prepare(settings, shape.vocab_size)
    trainer = Trainer(settings, shape, tokenizer, corpus)
    if trainer.resume():
        print(f"resuming at step {trainer.progress.step}, {trainer.progress.tokens} tokens", flush=True)
    signal.signal(signal.SIGTERM, trainer.stop)
    signal.signal(signal.SIGINT, trainer.stop)
    trainer.run()


if __name__ == "__main__":
    main()
