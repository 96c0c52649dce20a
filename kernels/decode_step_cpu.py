"""A step that decodes in one call of cpu_decode_step.cpp: inputs, forward pass, choice of tokens, count of new entries.
Draft tokens are verified too, unless somebody else is to: that leaves them the choice, and the count of those
sequences' entries.

Letters as in `kernels.decoder_cpu`; N slots, D of which bring tokens, T in all, L layers, B entries of a page, M
columns of a slot's page table. Bytes: the weights, head included, once, and the cache of D sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cpu_library import AttentionArgs, DecodeRowsArgs, SlotTablesArgs, loaded_library
from .decoder_cpu import DecoderCPU
from .sampling import RowMasks

_NO_TOKEN = -1
"""What the kernel returns where an id is no token."""

Cosines = Callable[[int], tuple[Tensor, Tensor]]
"""Cosines and sines [P, R / 2] of the positions from 0 on, P at least as many as asked for; contiguous, in the weights'
type."""


@dataclass(frozen=True, slots=True)
class SlotTables:
    """What is known of all slots: read where it lies, step after step, so it may change in place but not move.

    All contiguous.
    """

    pool: Tensor
    """[P, 2, B, D] in the weights' type. Mutated, as the next."""
    entry_positions: Tensor
    """[P, B] int32"""
    page_table: Tensor
    """[N, L, K, M] int32"""
    kept: Tensor
    """[N, L, K] int32: entries of each head; counted up."""
    computed: npt.NDArray[np.int64]
    """[N]: tokens computed; counted up."""
    closes_up: npt.NDArray[np.bool_]
    """[N]: whether entries are rotated to their places in the cache."""
    unaltered: npt.NDArray[np.bool_]
    """[N]: whether tokens are drawn from the logits as they are, but for masks,"""
    min_ends: npt.NDArray[np.int64]
    """[N]: from this position on."""
    strengths: Tensor
    """[N, at least 3] float32: temperature (0: the likeliest token, and nothing of the rest matters), top-p, min-p."""
    keys: Tensor
    """[N, 2] int64: seed, top-k."""
    newest: Tensor
    """[N] int64: the token that each drew last; written."""


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What a step computes."""

    slots: npt.NDArray[np.int32]
    """[D], distinct."""
    starts: npt.NDArray[np.int32]
    """[D]: logical positions of their first tokens."""
    token_ids: npt.NDArray[np.int32]
    """[T]: of one after the other, -1: the slot's newest."""
    counts: npt.NDArray[np.int32]
    """[D]: tokens of each, at least 1."""
    drafts: npt.NDArray[np.int32]
    """[D]: how many of them, the last ones, are proposals: fewer than all."""
    verified: bool = False
    """Whether the proposals are verified: all are `unaltered`, and bring one token besides."""
    places: npt.NDArray[np.int32] | None = None
    """[T]: the row of `scaled` that a proposal was drawn from, the first ones of a sequence; -1: none that matters."""
    scaled: Tensor | None = None
    """[Q, V] float32, contiguous: see `kernels.rejection`."""

    @property
    def proposals(self) -> int:
        """Of all."""
        return int(self.drafts.sum()) if len(self.token_ids) > len(self.slots) else 0


class Decoded(NamedTuple):
    """What a step of D rows gave."""

    tokens: npt.NDArray[np.int32] | None
    """[D]: -1 where a row's logits are not finite; None: some row is not `unaltered`, or there are proposals to be
    verified elsewhere, so who draws needs `logits`. Of verified steps [D, 1 + most proposals], padded with -1: the
    target's token, after those of the proposals that it would have said too."""
    counts: npt.NDArray[np.int32]
    """[D]: of verified steps, how many tokens each got; 0: some row's logits are not finite. Else of no meaning."""
    forward_seconds: float
    sample_seconds: float


class DecodeStepCPU:
    """Computes decodes of some of the slots; keeps weights and tables alive."""

    def __init__(self, decoder: DecoderCPU, tables: SlotTables, cosines: Cosines) -> None:
        self._call = loaded_library().decode_step
        self._decoder, self._tables, self._cosines = decoder, tables, cosines
        pool, heads = tables.pool, tables.page_table
        if pool.dtype != decoder.dtype or (heads.shape[2], pool.shape[3]) != (decoder.num_kv_heads, decoder.head_dim):
            raise ValueError(f"the cache must have {decoder.num_kv_heads} heads of {decoder.head_dim} {decoder.dtype}")
        self._attention = AttentionArgs(
            pool=pool.data_ptr(), entry_positions=tables.entry_positions.data_ptr(), heads=decoder.num_heads,
            kv_heads=decoder.num_kv_heads, width=decoder.head_dim, value_width=decoder.head_dim,
            page_size=pool.shape[2], scale=decoder.head_dim**-0.5,
        )  # fmt: skip
        arrays, tensors = ("computed", "closes_up", "unaltered", "min_ends"), ("kept", "strengths", "keys", "newest")
        self._slots = SlotTablesArgs(
            page_table=heads.data_ptr(), columns=heads.shape[3], strength_columns=tables.strengths.shape[1],
            **{name: getattr(tables, name).ctypes.data for name in arrays},
            **{name: getattr(tables, name).data_ptr() for name in tensors},
        )  # fmt: skip
        self._numbers = np.empty((7, len(heads)), np.int32)
        self._ids, self._drawn = np.empty(len(heads), np.int32), np.empty(len(heads), np.int32)
        self._rows = DecodeRowsArgs(threads=torch.get_num_threads())
        columns = (row.ctypes.data for row in self._numbers)
        names = ("slots", "starts", "ends", "single", "masked", "drafts", "counts")
        self._columns = dict(zip(names, columns, strict=True))
        for name in ("slots", "starts", "ends", "masked", "drafts", "counts"):
            setattr(self._rows, name, self._columns[name])
        self._rows.ids = self._ids.ctypes.data
        self._logits = torch.empty(0, decoder.vocab)
        self._set_angles(1)

    def _set_angles(self, positions: int) -> None:
        self._angles = cos, sin = self._cosines(positions)
        self._rows.cos, self._rows.sin = cos.data_ptr(), sin.data_ptr()
        self._rows.positions, self._rows.half = cos.shape

    def __call__(self, step: DecodeRows, masks: RowMasks | None = None) -> Decoded:
        """Compute the tokens, and draw what follows.

        masks: what some of the D may draw, where nothing is proposed. Raises `IndexError` where an id is no token.
        """
        count, total, rows, numbers = len(step.slots), len(step.token_ids), self._rows, self._numbers
        numbers[0, :count], numbers[1, :count], numbers[5, :count] = step.slots, step.starts, step.drafts
        step.counts.cumsum(out=numbers[2, :count])
        if total > len(self._ids):
            self._ids = np.empty(2 * total, np.int32)
            rows.ids = self._ids.ctypes.data
        self._ids[:total] = step.token_ids
        wanted = count + step.proposals
        if len(self._logits) < wanted:
            self._logits = torch.empty(wanted, self._decoder.vocab)
            rows.logits = self._logits.data_ptr()
        rows.count, rows.masks, rows.verify = count, None, step.verified
        rows.width, rows.tokens = 1, self._columns["single"]
        if step.verified:
            self._verify(step)
        if masks is not None:
            numbers[4, :count] = -1
            numbers[4, masks.rows] = np.arange(len(masks.rows))
            rows.masks, rows.mask_stride = masks.bits.ctypes.data, masks.bits.strides[0]
        found = self._call(self._decoder.args, self._attention, self._slots, rows)
        if found > 0:
            self._set_angles(found)
            found = self._call(self._decoder.args, self._attention, self._slots, rows)
        if found == _NO_TOKEN:
            raise IndexError(f"an id is not below {self._decoder.vocab}")
        assert found == 0, "a head outgrows its page table"
        assert rows.drawn or not step.verified, "a row to be verified is altered"
        tokens = self._drawn[: count * rows.width].reshape(count, -1) if step.verified else numbers[3, :count]
        times = rows.forward_seconds, rows.sample_seconds
        return Decoded(tokens.copy() if rows.drawn else None, numbers[6, :count].copy(), *times)

    def _verify(self, step: DecodeRows) -> None:
        """What the call needs to verify proposals."""
        rows, width = self._rows, int(step.counts.max())
        if len(step.slots) * width > len(self._drawn):
            self._drawn = np.empty(2 * len(step.slots) * width, np.int32)
        rows.width, rows.tokens = width, self._drawn.ctypes.data
        rows.places = None if step.places is None else step.places.ctypes.data
        rows.scaled = None if step.scaled is None else step.scaled.data_ptr()

    def logits(self, count: int) -> Tensor:
        """[count, V] float32 of the last call, of so many rows; the next one overwrites them."""
        return self._logits[:count]
