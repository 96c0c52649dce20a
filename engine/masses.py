"""Attention mass of several sequences of a step at once, by the Triton kernel.

It takes the log-sum-exps that attention has kept of the rows; where there are none, `engine.observe` recomputes the
weights (`kernels.attention_columns`). Letters as in `models.context`; T' rows of the S' sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.context import AttentionContext, Scoring
from .staging import upload


@dataclass(frozen=True, slots=True)
class MassRows:
    """Which rows of a step are looked at, and in which sequences' pages."""

    lengths: tuple[int, ...]
    """[S']: rows of each."""
    longest: int
    """Entries of the longest head, the new ones included."""
    rows: Tensor
    """[T'] int64: of the batch."""
    sequences: Tensor
    """[S'] int64: of the batch."""
    starts: Tensor
    """[S' + 1] int32: first of the T' rows of each."""

    @staticmethod
    def of(sequences: Sequence[int], spans: Sequence[slice], longest: int, device: torch.device) -> "MassRows":
        """Of some sequences of a batch and their rows in it."""
        lengths = tuple(span.stop - span.start for span in spans)
        rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        sizes = [len(rows), len(sequences), len(sequences) + 1]
        packed = upload(np.concatenate([rows, sequences, [0], np.cumsum(lengths)]).astype(np.int64), device)
        at, members, starts = packed.split(sizes)
        return MassRows(lengths, longest, at, members, starts.int())

    def masses(
        self, context: AttentionContext, layer: int, query: Tensor, log_sums: Tensor, scoring: Scoring
    ) -> Tensor:
        """[S', K, longest] float32: what the rows give each entry of a layer, summed over rows and query groups.

        query [T', H, D] and log_sums [T', H] are of these rows alone.
        """
        from ..kernels.attention_mass_triton import attention_mass_triton  # triton is installed beside a GPU only

        return attention_mass_triton(
            query,
            context.pool,
            context.entry_positions,
            context.page_table[self.sequences, layer],
            context.kept[self.sequences, layer],
            self.starts,
            self.lengths,
            context.positions[self.rows],
            log_sums,
            max_kept=self.longest,
            scale=scoring.scale,
            softcap=scoring.softcap,
        )
