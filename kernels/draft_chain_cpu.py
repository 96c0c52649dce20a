"""The passes by which a small model continues its own tokens, all in one call of cpu_draft_chain.cpp.

Letters as in `kernels.decoder_cpu`; k tokens of each of S sequences, V vocabulary. Bytes: k times the weights, head
included, and the cache of S sequences.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_cpu import PagedStep
from .cpu_library import DraftChainArgs, loaded_library
from .decoder_cpu import DecoderCPU
from .rotary import Angles

_NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True)
class DrawRules:
    """How the tokens of chains are drawn, as `kernels.distributions` and `kernels.noise` say; Q rows are kept."""

    temperature: Tensor
    """[S] float32, at least `MIN_TEMPERATURE`; or 0: the likeliest token, and nothing of what follows matters."""
    top_k: Tensor
    """[S] int64"""
    top_p: Tensor
    """[S] float32"""
    min_p: Tensor
    """[S] float32"""
    seeds: Tensor
    """[S] int64"""
    positions: Tensor
    """[k, S] int64, contiguous, as the next: what keys the noise."""
    places: Tensor
    """[k, S] int64: which row of `scaled` a token is drawn from, -1 for one that is not kept."""
    scaled: Tensor
    """[Q, V] float32, contiguous; filled by who draws."""

    @staticmethod
    def likeliest(sequences: int) -> "DrawRules":
        """The likeliest tokens of so many sequences."""
        return DrawRules(torch.zeros(sequences), *(_NOTHING,) * 7)


def draft_chain_cpu(
    decoder: DecoderCPU,
    tokens: Tensor,
    active: Sequence[int],
    logits: Tensor,
    rules: DrawRules,
    angles: Angles,
    step: PagedStep,
) -> None:
    """Fill tokens [k, S] int64, contiguous; active [k]: how many sequences, always the first ones, get a token at each
    depth, in descending order.

    logits [S, V] float32, contiguous: what the first tokens are drawn from; overwritten. angles: of all positions, from
    0 on, picked by those of `step`: one row per sequence, that of its first token; its positions and kept lengths are
    counted up where it has them. A row that is not finite goes on with token 0.
    """
    depth, sequences = tokens.shape
    if logits.shape != (sequences, decoder.vocab) or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous [{sequences}, {decoder.vocab}], got {list(logits.shape)}")
    shared, _buffers = decoder.prepare(sequences, sequences, angles, step)
    counts, further = (ctypes.c_int64 * depth)(*active), torch.empty((sequences, decoder.vocab))
    shared.logits = further.data_ptr()
    # Contiguous, and alive until the call returns.
    temperature, floor, top_p = rules.temperature.contiguous(), rules.min_p.log(), rules.top_p.contiguous()
    top_k, seeds = rules.top_k.contiguous(), rules.seeds.contiguous()
    chain = DraftChainArgs(
        tokens=tokens.data_ptr(), active=ctypes.addressof(counts), first=logits.data_ptr(),
        temperature=temperature.data_ptr(), top_p=top_p.data_ptr(), floor=floor.data_ptr(), top_k=top_k.data_ptr(),
        seeds=seeds.data_ptr(), positions=rules.positions.data_ptr(), places=rules.places.data_ptr(),
        scaled=rules.scaled.data_ptr(), depth=depth, sequences=sequences,
    )  # fmt: skip
    loaded_library().draft_chain(decoder.args, shared, step.args, chain)
