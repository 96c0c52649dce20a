"""What the target says at the positions of many rows of text, compactly on disk.

Whole distributions would take megabytes a row; kept are the K most likely tokens with their log-probabilities and the
log mass of all others, in float16: 4 (K + 1) bytes a token for vocabularies up to 65,536. They come from a forward
pass of the target, or from a log of what it said as it served. A shard is a folder of memory-mapped arrays that appears
whole or not at all, so an interrupted run finds what it had made.
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

from ..core.top_rows import row_bytes, unpack_rows
from .divergences import ABSENT, acceptance, lump

Logits = Callable[[Tensor], Tensor]  # ids [B, T] -> logits [B, T, V]


@dataclass(frozen=True, slots=True)
class Logged:
    """What the target said at consecutive positions as it served."""

    data: bytes
    """Rows of `core.top_rows`."""
    kept: int
    """Tokens of each."""

    def __len__(self) -> int:
        return len(self.data) // row_bytes(self.kept)

    def distributions(self) -> tuple[Tensor, Tensor]:
        """Tokens [N, k] int64 and log-probabilities [N, k + 1] float32. Raises `ValueError` for what are no rows."""
        ids, logs = unpack_rows(self.data, self.kept)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logs.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens to train on."""

    ids: Sequence[int]
    """At least one."""
    start: int = 0
    """First position that counts; each position's distribution is that of the token after it."""
    logged: Logged | None = None
    """What the target says from there on, where that is known already; it may go on behind the row's end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to train on, padded to the longest."""

    ids: Tensor
    """[B, T] int64."""
    starts: Tensor
    """[B] int64: first position of each row that counts."""
    counts: Tensor
    """[B] int64: tokens of each row; each one's distribution is that of the token after it."""
    top_ids: Tensor
    """[B, T, K] int64."""
    top_log: Tensor
    """[B, T, K + 1] float32: log-probabilities, that of all other tokens last; `ABSENT` where less than K are known."""

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: positions that hold a token and count."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (self.starts[:, None] <= place) & (place < self.counts[:, None])


class Shard:
    """Some rows with their distributions, read from disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")  # [R, T]
        self.starts = np.load(folder / "starts.npy")  # [R] int32
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

    def write(self, folder: Path, rows: Sequence[Row], on_row: Callable[[int], None] = lambda done: None) -> None:
        """Make a shard; `on_row` may raise to give up, and nothing is stored. Raises `OSError` on a full disk."""
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = np.array([len(row.ids) for row in rows], np.int32)
        np.save(partial / "counts.npy", counts)
        np.save(partial / "starts.npy", np.array([row.start for row in rows], np.int32))
        shape, kind = (len(rows), int(counts.max())), np.uint16 if self.vocab_size <= 2**16 else np.int32
        with (
            RowFile(partial / "ids.npy", shape, kind) as ids,
            RowFile(partial / "top_ids.npy", (*shape, self.kept), kind) as top_ids,
            RowFile(partial / "top_log.npy", (*shape, self.kept + 1), np.float16) as top_log,
        ):
            for number, row in enumerate(rows):
                on_row(number)
                best, logs = self.distributions(row)
                ids.append(0, np.asarray(row.ids))
                top_ids.append(row.start, best.cpu().numpy())
                top_log.append(row.start, logs.cpu().numpy())
        os.replace(partial, folder)

    @torch.inference_mode()
    def agreement(self, row: Row) -> float:
        """Mass that the target and what was logged of it have in common, on average over the row; temperature 1."""
        assert row.logged is not None
        count = len(row.ids) - row.start
        ids, logs = (part[:count].to(self.device) for part in row.logged.distributions())
        logits = self.logits(torch.tensor([list(row.ids)], device=self.device))[0, row.start :]
        return acceptance(logs, lump(logits, ids)).mean().item()

    @torch.inference_mode()
    def distributions(self, row: Row) -> tuple[Tensor, Tensor]:
        """Tokens [N, K] and log-probabilities [N, K + 1] at a row's N positions from `start` on."""
        if row.logged is not None:
            count = len(row.ids) - row.start
            ids, logs = row.logged.distributions()
            return _with_kept(ids[:count], logs[:count], self.kept)
        logits = self.logits(torch.tensor([list(row.ids)], device=self.device))[0, row.start :] / self.temperature
        best = logits.topk(self.kept).indices
        return best, lump(logits, best)


def _with_kept(ids: Tensor, logs: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Rows of ids [N, k] and logs [N, k + 1] with `kept` tokens: the last ones join the others, or there are none."""
    missing = max(0, kept - ids.shape[1])
    others = logs[:, kept - missing :].logsumexp(1, keepdim=True)
    ids = torch.cat([ids[:, :kept], ids.new_zeros(len(ids), missing)], 1)
    none = logs.new_full((len(ids), missing), float("-inf"))
    return ids, torch.cat([logs[:, : kept - missing], none, others], 1)


class RowFile:
    """A `.npy` file whose rows come one after another; what they leave open is zeros.

    Written, not mapped: a full disk is an error to one who writes, but ends the process of one who maps.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], kind: type) -> None:
        """shape: (rows, T, ...); kind: scalar type of NumPy."""
        self._row: np.ndarray = np.zeros(shape[1:], kind)
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._row.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, start: int, values: np.ndarray) -> None:
        """The next row: values [N, ...] from position `start` on."""
        self._row[:] = 0
        self._row[start : start + len(values)] = values
        self._file.write(self._row.data)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
    top_log = (top_log - top_log.logsumexp(-1, keepdim=True)).clamp_min(ABSENT)
    starts = np.array([shards[s].starts[r] for s, r in picks], np.int64)
    return Batch(
        gather("ids", np.int64),
        torch.from_numpy(starts).to(device),
        torch.from_numpy(counts).to(device),
        gather("top_ids", np.int64),
        top_log,
    )
