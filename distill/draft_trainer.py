"""The training loop of a draft: rounds of rows with the target's distributions, and steps on them.

A round's rows are made from the draft as it is at its start (see `rounds`), scored by the target, and stored; the
steps of a round draw from the newest few rounds. All that a step does is a function of its number and of what is
stored, so a run that was interrupted ends with the same weights as one that was not.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .divergences import ABSENT, FORMULAS, Divergence, lump
from .optimizer import MaskedMuon, Rates
from .stored import reading
from .target_rows import Batch, Shard, read_rows


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast a draft learns."""

    steps: int
    batch_rows: int = 8
    micro_rows: int = 4
    """Rows in one forward pass."""
    round_rows: int = 256
    passes: float = 2.0
    """Times that a row is used, on average."""
    window: int = 3
    """Rounds that a step draws from."""
    rate: float = 0.3
    """Of the optimizer's peak rates."""
    warmup: int = 20
    """Steps."""
    decay: float = 0.5
    """Share of the steps, at the end, in which the rate falls linearly."""
    last_rate: float = 0.02
    """Of the peak, at the end."""

    @property
    def round_steps(self) -> int:
        """Steps between two rounds of new rows."""
        return max(1, round(self.round_rows * self.passes / self.batch_rows))

    def rows_of(self, number: int) -> int:
        """Rows to make for a round: fewer for a last one that is cut short."""
        steps = min(self.round_steps, self.steps - number * self.round_steps)
        return min(self.round_rows, max(self.batch_rows, math.ceil(steps * self.batch_rows / self.passes)))

    def rate_at(self, step: int) -> float:
        """Factor on the optimizer's peak rates in step number `step`, from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = (1.0 - step / self.steps) / self.decay
        return self.rate * min(rise, max(self.last_rate, min(1.0, fall)))


@dataclass(slots=True)
class Progress:
    """What moves on during a run, besides weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """In steps."""
    round_seconds: float = 0.0
    """In making rows and measuring, between steps."""
    loss: float = math.nan
    """Smoothed."""


class DraftTrainer:
    """Owns the draft, its optimizer and progress."""

    def __init__(
        self,
        draft: PreTrainedModel,
        schedule: Schedule,
        folder: Path,
        *,
        divergence: Divergence,
        temperature: float,
        seed: int,
    ) -> None:
        """folder: where shards and `state.pt` are; temperature: that of the target's stored distributions."""
        self.draft = draft
        self.schedule = schedule
        self.folder = folder
        self.progress = Progress()
        self.temperature = temperature
        self._formula = FORMULAS[divergence]
        self._seed = seed
        self._optimizer = MaskedMuon(draft, {}, Rates(), _tables(draft))

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.schedule.steps

    def train_round(self, make_shard: Callable[[int, Path], None], stopping: Callable[[], bool]) -> Iterator[float]:
        """The steps left of the present round, each giving its loss; its rows are made first if they are missing."""
        schedule, progress = self.schedule, self.progress
        number = progress.step // schedule.round_steps
        path = self._shard_path(number)
        if not path.exists():
            make_shard(number, path)
        shards = [self._shard(n) for n in range(max(0, number - schedule.window + 1), number + 1)]
        end = min(schedule.steps, (number + 1) * schedule.round_steps)
        while progress.step < end and not stopping():
            started = time.monotonic()
            loss = self._step(shards)
            progress.seconds += time.monotonic() - started
            progress.loss = loss if math.isnan(progress.loss) else 0.97 * progress.loss + 0.03 * loss
            yield loss

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}"

    def _shard(self, number: int) -> Shard:
        path = self._shard_path(number)
        with reading(path):
            return Shard(path)

    def _step(self, shards: list[Shard]) -> float:
        """One optimizer step; its mean loss per token."""
        schedule, progress = self.schedule, self.progress
        rng = np.random.default_rng((self._seed, 2, progress.step))
        picks = [(s, r) for s, shard in enumerate(shards) for r in range(len(shard))]
        chosen = [picks[index] for index in rng.permutation(len(picks))[: schedule.batch_rows]]
        # Rows of like length together: less padding.
        chosen.sort(key=lambda pick: int(shards[pick[0]].counts[pick[1]]))
        device = self.draft.device
        total_tokens = sum(int(shards[s].counts[r] - shards[s].starts[r]) for s, r in chosen)
        total = 0.0
        for first in range(0, len(chosen), schedule.micro_rows):
            batch = read_rows(shards, chosen[first : first + schedule.micro_rows], device)
            loss = self.losses(batch).sum() / total_tokens
            loss.backward()
            total += loss.item()
        self._optimizer.step(schedule.rate_at(progress.step))
        progress.step += 1
        progress.tokens += total_tokens
        return total

    def losses(self, batch: Batch) -> Tensor:
        """The divergence [N] at each valid position."""
        valid = batch.valid
        with torch.autocast(self.draft.device.type, torch.bfloat16):
            logits = self.draft(input_ids=batch.ids, use_cache=False).logits
        if self.temperature != 1.0:
            logits = logits.float() / self.temperature
        # All rows, then those that count: to pick among whole rows of logits would copy them, there and back.
        q_log = lump(logits.flatten(0, 1), batch.top_ids.flatten(0, 1), batch.top_log[..., :-1].flatten(0, 1) == ABSENT)
        return self._formula(batch.top_log[valid], q_log[valid.flatten()])

    def drop_old_shards(self) -> None:
        """Remove rounds that no later step will draw from."""
        number = self.progress.step // self.schedule.round_steps
        for old in range(number - self.schedule.window, -1, -1):
            path = self._shard_path(old)
            if not path.exists():
                break
            for file in path.iterdir():
                file.unlink()
            path.rmdir()

    def save(self) -> None:
        """Write `state.pt`, whole or not at all; raises `OSError` where there is no room for it."""
        path = self.folder / "state.pt"
        new = path.with_suffix(".new")
        state = {
            "draft": {n: p for n, p in self.draft.named_parameters() if p.requires_grad},
            "optimizer": self._optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        try:
            torch.save(state, new)
        except (OSError, RuntimeError) as error:  # a full disk is the latter to the library, with an unreadable reason
            new.unlink(missing_ok=True)
            raise OSError(f"cannot write {new}: is the disk full?") from error
        os.replace(new, path)

    def resume(self) -> bool:
        """Go on from `state.pt` if there is one; raises `ConfigError` if it is damaged."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        with reading(path):
            state = torch.load(path, map_location=self.draft.device, weights_only=True)
            self.draft.load_state_dict(state["draft"], strict=False)
            self._optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        return True


def _tables(model: PreTrainedModel) -> set[str]:
    """Names of embedding and head: matrices whose rows are tokens."""
    tables = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}
