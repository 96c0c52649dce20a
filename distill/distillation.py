"""One distillation from beginning to end: what `quire distill` runs, without its command line.

Everything is in the folder of the run: `settings.json`, `held_out.json`, `log.jsonl`, `state.pt` and the rounds' rows
while it runs, `draft/` and the report at its end. The target's text comes from the serving engine; its distributions
come from a forward pass of the same weights by transformers, because the engine hands out no more than the 20 most
likely tokens of a position, or from a server's log, where these 20 are all that is left of a pass already made.
"""

import json
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..core.errors import ConfigError
from ..models.checkpoint import open_checkpoint
from ..models.spec import max_context
from .draft_export import copy_generation_config, export_draft
from .draft_init import Init, load_model, make_draft, place
from .draft_report import Costs, write_report
from .draft_trainer import DraftTrainer
from .held_out import ALL, HeldText, Measured, choose, make_held_texts, measure
from .presets import from_preset
from .prompts import Example, hold_out, load_tokenizer, read_examples
from .rounds import Engines, RowMaker, self_examples
from .run_settings import Settings, claim_folder
from .stored import reading, storing
from .target_rows import Recorder

SELF_EXAMPLES = 1000
CALIBRATION_ROWS = 16
LOG_SECONDS = 10.0
LOGGED_TEMPERATURE = 1.0
"""Of logged distributions; the others' mass at any other cannot be told from that."""
CHECKED_ROWS = 8
LEAST_AGREEMENT = 0.9
"""Mass that target and log have in common, on average: rounding takes hundredths at most, another model tenths."""
BATCHES = (1, 4, 16, 64)
"""Sequences at once for which a speed-up is worked out."""


class Interrupts:
    """SIGINT and SIGTERM within a block: at once, except within optimizer steps, which are finished first."""

    def __init__(self) -> None:
        self.requested = False
        self.waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        self.requested = True
        if not self.waits:
            raise KeyboardInterrupt


class Distillation:
    """Owns target, draft and data of one run."""

    def __init__(self, settings: Settings, engines: Engines, say: Callable[[str], None] = print) -> None:
        """Load everything. Raises `QuireError` for what cannot be."""
        self.settings = settings
        self.engines = engines
        self.say = say
        self.acceptance = math.nan
        """As last measured."""
        self.device = torch.device(pick_device(settings.device))
        checkpoint = open_checkpoint(settings.target, with_code=settings.trust_remote_code)
        self.folder, init = checkpoint.folder, settings.init.settled(checkpoint)
        self._claim = claim_folder(settings)
        disable_progress_bar()  # of the library's loading and saving: round after round, between our own lines
        self.target = load_model(settings.target, "auto", settings.trust_remote_code)
        context = max_context(self.target.config.get_text_config(decoder=True))
        if settings.length > context:
            raise ConfigError(
                f"rows of {settings.length} tokens are longer than the target's {context}", param="length"
            )
        place(self.target, self.device)
        self.target.requires_grad_(False)
        self.tokenizer = load_tokenizer(settings.target, settings.trust_remote_code)
        train, held = self._examples()
        self.recorder = Recorder(
            whole_logits(self.target),
            self.vocab_size,
            min(settings.kept, self.vocab_size),
            settings.temperature,
            self.device,
        )
        self.rows = RowMaker(
            train,
            settings.mixture if settings.data else settings.mixture.unknown(),
            settings.length,
            settings.temperatures,
            settings.seed,
            settings.target,
            uses_logged=settings.temperature == LOGGED_TEMPERATURE,
        )
        self._check_logged(train)
        with storing(settings.out):
            self.texts = self._held_texts(held)
        torch.manual_seed(settings.seed)
        self.draft = make_draft(self._sized(init), self.target, self._calibration())
        self.trainer = DraftTrainer(
            self.draft,
            settings.schedule,
            settings.out,
            divergence=settings.divergence,
            temperature=settings.temperature,
            seed=settings.seed,
        )

    def _sized(self, init: Init) -> Init:
        """With a preset worked out, and told."""
        sized = from_preset(init, self.target)
        if sized != init:
            self.say(f"{init.source} is {sized.source}" + (f", feed-forward {sized.mlp}" if sized.mlp else ""))
        return sized

    @property
    def vocab_size(self) -> int:
        """Rows of the target's logits."""
        size: int = self.target.get_output_embeddings().weight.shape[0]
        return size

    def run(self) -> None:
        """Train what is left, write the draft and the report. KeyboardInterrupt leaves a state to go on from, and so
        does the `ConfigError` where there is no room for what is to be written."""
        with self._claim, storing(self.settings.out):
            self._run()

    def _run(self) -> None:
        if self.trainer.resume():
            self.say(f"going on at step {self.trainer.progress.step} of {self.settings.schedule.steps}")
        try:
            with Interrupts() as interrupts:
                while not self.trainer.done:
                    self._note()
                    self._train_round(interrupts)
        except KeyboardInterrupt:
            self.say(f"stopped at step {self.trainer.progress.step}; the same command goes on from there")
            raise
        folder = self.settings.out / "draft"
        self._export(folder, complete=False)
        about = {"settings": self.settings, "progress": asdict(self.trainer.progress)}
        about = json.loads(msgspec.json.encode(about, enc_hook=str))
        paths = write_report(self.settings.out, about, self.initial(), self.measure(self.texts), self._costs())
        self.say(f"wrote {', '.join(map(str, [folder, *paths]))}")

    def measure(self, texts: list[HeldText]) -> Measured:
        """Acceptance of the draft as it is."""
        settings = self.settings
        return measure(
            texts,
            whole_logits(self.target),
            whole_logits(self.draft),
            most=settings.draft_tokens,
            temperature=settings.temperature,
            device=self.device,
        )

    def initial(self) -> Measured:
        """What the draft gave before its first step, on all texts."""
        path = self.settings.out / "initial.json"
        with reading(path):
            return msgspec.json.decode(path.read_bytes(), type=Measured)

    def _train_round(self, interrupts: Interrupts) -> None:
        """One round's steps, with log lines and saves; raises KeyboardInterrupt when asked to stop."""
        trainer, spoken, saved = self.trainer, time.monotonic(), time.monotonic()
        trainer.save()
        steps = trainer.train_round(self._make_shard, lambda: interrupts.requested)
        for _ in steps:
            interrupts.waits = True
            if time.monotonic() - spoken > LOG_SECONDS or trainer.done:
                spoken = time.monotonic()
                self.say(self._line())
            if time.monotonic() - saved > 60 * self.settings.save_minutes:
                saved = time.monotonic()
                trainer.save()
        interrupts.waits = False
        trainer.save()
        trainer.drop_old_shards()
        if interrupts.requested:
            raise KeyboardInterrupt

    def _make_shard(self, number: int, path: Path) -> None:
        """Rows of a round and what the target says of them."""
        settings, started = self.settings, time.monotonic()
        sampler = settings.out / "sampler"
        self._export(sampler, complete=True)
        rows = self.rows.rows(number, settings.schedule.rows_of(number), str(sampler), self.engines)
        generated = time.monotonic()
        self.recorder.write(path, rows)
        tokens, logged, now = (
            sum(len(row.ids) for row in rows),
            sum(row.logged is not None for row in rows),
            time.monotonic(),
        )
        self.trainer.progress.round_seconds += now - started
        self.say(
            f"round {number}: {len(rows)} rows ({logged} as logged), {tokens} tokens; "
            f"written in {generated - started:.0f} s, scored in {now - generated:.0f} s"
        )

    def _export(self, folder: Path, complete: bool) -> None:
        """The draft as it is; with a tokenizer if it can be served by itself."""
        tokenizer = self.tokenizer if complete or not self.draft.config.quire_shares_embedding else None
        export_draft(self.draft, folder, self.target.dtype, complete=complete, tokenizer=tokenizer)
        copy_generation_config(self.folder, folder)

    def _examples(self) -> tuple[list[Example], list[Example]]:
        """To train on, and held out."""
        settings = self.settings
        if settings.data:
            found = [e for path in settings.data for e in read_examples(path, self.tokenizer, self.vocab_size)]
        else:
            start = self.tokenizer.bos_token_id
            found = self_examples(SELF_EXAMPLES, start, self.vocab_size, settings.seed, settings.target, self.engines)
        if not settings.held_out:
            return hold_out(found)
        return found, [e for path in settings.held_out for e in read_examples(path, self.tokenizer, self.vocab_size)]

    def _check_logged(self, examples: Sequence[Example]) -> None:
        """Raises `ConfigError` if what was logged is not what this target says."""
        logged = [example for example in examples if example.logged is not None]
        random.Random(self.settings.seed).shuffle(logged)
        rows = islice(filter(None, map(self.rows.logged_row, logged)), CHECKED_ROWS)
        found = [self.recorder.agreement(row) for row in rows]
        agreement = sum(found) / len(found) if found else 1.0
        if agreement < LEAST_AGREEMENT:
            raise ConfigError(
                f"the logged log-probabilities are not those of {self.settings.target}: on average "
                f"{agreement:.2f} of their mass is the same; distil from the model that was served then",
                param="from_traffic",
            )

    def _held_texts(self, held: list[Example]) -> list[HeldText]:
        settings = self.settings
        return make_held_texts(
            settings.out / "held_out.json",
            choose(held, settings.held_texts),
            settings.target,
            self.engines,
            length=settings.length,
            new_tokens=settings.held_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )

    def _calibration(self) -> list[Tensor]:
        """Some rows of known text and the target's answers, to rank what the draft keeps."""
        few = self.texts[:CALIBRATION_ROWS]
        return [torch.tensor([text.prompt + text.sampled], device=self.device) for text in few]

    def _costs(self) -> Costs:
        """Seconds of steps of target and draft, on this machine as it is now."""
        sampler = self.settings.out / "sampler"
        self._export(sampler, complete=True)
        verified = [batch * (self.settings.draft_tokens + 1) for batch in BATCHES]
        return Costs(
            self.engines.step_seconds(self.settings.target, sorted({*BATCHES, *verified})),
            self.engines.step_seconds(str(sampler), BATCHES),
        )

    def _note(self) -> None:
        """Measure on some of the texts, for people and for `log.jsonl`."""
        progress, started = self.trainer.progress, time.monotonic()
        found = self.measure(self.texts[: max(1, len(self.texts) // 3)])
        if progress.step == 0:
            (self.settings.out / "initial.json").write_bytes(msgspec.json.encode(self.measure(self.texts)))
        entry: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens, "loss": progress.loss}
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry | msgspec.to_builtins(found)) + "\n")
        self.acceptance = found.acceptance[ALL]
        progress.round_seconds += time.monotonic() - started
        self.say(
            f"step {progress.step}: held-out acceptance {found.acceptance[ALL]:.3f}, same most likely token "
            f"{found.agreement[ALL]:.3f}, accepted of {found.most} greedy drafts {found.accepted_length[ALL]:.2f}"
        )

    def _line(self) -> str:
        progress, schedule = self.trainer.progress, self.settings.schedule
        speed = progress.tokens / max(progress.seconds, 1e-9)
        rounds, begun = -(-schedule.steps // schedule.round_steps), -(-progress.step // schedule.round_steps)
        left = (schedule.steps - progress.step) * progress.seconds / progress.step
        left += (rounds - begun) * progress.round_seconds / begun
        return (
            f"step {progress.step}/{schedule.steps}: loss {progress.loss:.4f}, acceptance {self.acceptance:.3f}, "
            f"{speed:,.0f} tokens/s, {left / 60:.0f} min left"
        )


def whole_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Whole logits [B, T, V] of ids [B, T]."""

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    return logits


def pick_device(name: str) -> str:
    """A GPU for `auto` if there is one; raises `ConfigError` if one was asked for in vain."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device was found", param="device")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
