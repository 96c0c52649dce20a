"""The passes by which a small model continues its own greedy tokens, all in one call of cpu_draft_chain.cpp.

Letters as in `kernels.decoder_cpu`; k tokens of each of S sequences, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_cpu import PagedStep
from .cpu_library import DraftChainArgs, loaded_library
from .decoder_cpu import DecoderCPU


@dataclass(frozen=True, slots=True)
class DraftChainCPU:
    """What surrounds the layers, contiguous and of the layers' type."""

    layers: DecoderCPU
    embedding: Tensor
    """[V, E]"""
    norm: Tensor
    """[E]"""
    head: Tensor
    """[V, E]"""

    def __call__(self, tokens: Tensor, active: Sequence[int], angles: tuple[Tensor, Tensor], step: PagedStep) -> None:
        """Fill tokens [k, S] int64, contiguous, behind its first row, which is given; active [k]: how many sequences,
        always the first ones, go on at each depth, in descending order.

        angles: cos and sin [P, R / 2] of the positions from 0 on. step: one row per sequence; its positions and kept
        lengths are counted up where it has them. A row that is not finite goes on with token 0.
        """
        depth, sequences = tokens.shape
        vocab, hidden = self.head.shape
        x = torch.empty((sequences, hidden), dtype=self.layers.dtype)
        shared, _buffers = self.layers.prepare(x, *angles, step)
        counts, logits = (ctypes.c_int64 * depth)(*active), torch.empty((sequences, vocab))
        chain = DraftChainArgs(
            tokens=tokens.data_ptr(), active=ctypes.addressof(counts), embedding=self.embedding.data_ptr(),
            norm=self.norm.data_ptr(), head=self.head.data_ptr(), cos=angles[0].data_ptr(), sin=angles[1].data_ptr(),
            logits=logits.data_ptr(), depth=depth, sequences=sequences, vocab=vocab,
        )  # fmt: skip
        loaded_library().draft_chain(*self.layers.layers, shared, step.args, chain)
