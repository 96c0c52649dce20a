"""What the target says at every position of many rows of text, compactly on disk.

Whole distributions would take megabytes a row; kept are the K most likely tokens with their log-probabilities and the
log mass of all others, in float16: 4 (K + 1) bytes a token for vocabularies up to 65,536. A shard is a folder of
memory-mapped arrays that appears whole or not at all, so an interrupted run finds what it had made.
Letters: R rows, T tokens of the longest row, K tokens kept of each distribution.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .divergences import lump

Logits = Callable[[Tensor], Tensor]  # ids [B, T] -> logits [B, T, V]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to train on, padded to the longest."""

    ids: Tensor
    """[B, T] int64."""
    counts: Tensor
    """[B] int64: tokens of each row; each one's distribution is that of the token after it."""
    top_ids: Tensor
    """[B, T, K] int64."""
    top_log: Tensor
    """[B, T, K + 1] float32: log-probabilities, that of all other tokens last."""

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: positions that hold a token."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.counts[:, None]


class Shard:
    """Some rows with their distributions, read from disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")  # [R, T]
        self.counts = np.load(folder / "counts.npy")  # [R] int32
        self.top_ids = np.load(folder / "top_ids.npy", mmap_mode="r")  # [R, T, K]
        self.top_log = np.load(folder / "top_log.npy", mmap_mode="r")  # [R, T, K + 1] float16

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True, slots=True)
class Recorder:
    """Computes and stores the target's distributions."""

    logits: Logits
    vocab_size: int
    kept: int
    """K, at most the vocabulary."""
    temperature: float
    """At which the distributions are taken; > 0."""
    device: torch.device

    def write(
        self, folder: Path, rows: Sequence[Sequence[int]], on_row: Callable[[int], None] = lambda done: None
    ) -> None:
        """Make a shard of rows of at least one token each; `on_row` may raise to give up, and nothing is stored."""
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = np.array([len(row) for row in rows], np.int32)
        np.save(partial / "counts.npy", counts)
        shape, kind = (len(rows), int(counts.max())), np.uint16 if self.vocab_size <= 2**16 else np.int32
        ids = _create(partial / "ids.npy", shape, kind)
        top_ids = _create(partial / "top_ids.npy", (*shape, self.kept), kind)
        top_log = _create(partial / "top_log.npy", (*shape, self.kept + 1), np.float16)
        for number, row in enumerate(rows):
            on_row(number)
            best, logs = self._distributions(row)
            ids[number, : len(row)] = row
            top_ids[number, : len(row)] = best.cpu().numpy()
            top_log[number, : len(row)] = logs.cpu().numpy()
        for store in (ids, top_ids, top_log):
            store.flush()
        os.replace(partial, folder)

    @torch.inference_mode()
    def _distributions(self, row: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens [T, K] and log-probabilities [T, K + 1] of one row."""
        logits = self.logits(torch.tensor([list(row)], device=self.device))[0] / self.temperature
        best = logits.topk(self.kept).indices
        return best, lump(logits, best)


def _create(path: Path, shape: tuple[int, ...], kind: type) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)


def read_rows(shards: Sequence[Shard], picks: Sequence[tuple[int, int]], device: torch.device) -> Batch:
    """The rows named by (index of shard, row), together."""
    counts = np.array([shards[s].counts[r] for s, r in picks], np.int64)
    longest = int(counts.max())

    def gather(name: str, kind: type) -> Tensor:
        parts = [np.asarray(getattr(shards[s], name)[r, :longest]) for s, r in picks]
        filled = np.zeros((len(parts), longest, *parts[0].shape[1:]), kind)
        for row, part in zip(filled, parts, strict=True):
            row[: len(part)] = part
        return torch.from_numpy(filled).to(device)

    top_log = gather("top_log", np.float32)
    # float16 rounded each: together they must be 1 again, or kl could be negative
    top_log = top_log - top_log.logsumexp(-1, keepdim=True)
    return Batch(gather("ids", np.int64), torch.from_numpy(counts).to(device), gather("top_ids", np.int64), top_log)
