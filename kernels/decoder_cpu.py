"""A gated decoder's forward pass in one call of cpu_decoder.cpp: what it computes is that of the functions one by one.

For a step that nobody looks into between the layers. Letters: T rows, S sequences, W rows whose logits are wanted, E
hidden size, H query heads, K kv heads, D head dim, F feed-forward size, R rotated entries of a head, V vocabulary.

A decode step is bound by bytes: all weights once, and the keys and values of what the rows see. A prompt by FLOPs: 2 T
per weight and, for attention, 4 H D per pair of a row and an entry that it sees.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .attention_cpu import PagedStep, window_argument
from .cpu_library import DecoderArgs, DecoderLayerArgs, DecoderStepArgs, Matrix, loaded_library
from .rotary import Angles


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters, contiguous and all of one type; a matrix [out, in] comes with its bias [out] or None."""

    attention_norm: Tensor
    """[E]"""
    mlp_norm: Tensor
    """[E]"""
    head_norm: Tensor | None
    """[H + K, D]"""
    qkv: tuple[Tensor, Tensor | None]
    """[(H + 2 K) * D, E]: query, key and value heads."""
    output: tuple[Tensor, Tensor | None]
    """[E, H * D]"""
    gate_up: tuple[Tensor, Tensor | None]
    """[2 F, E]: gate over up; the activation is SiLU."""
    down: tuple[Tensor, Tensor | None]
    """[E, F]"""
    window: int | None


@dataclass(frozen=True, slots=True)
class EndWeights:
    """What surrounds the layers, contiguous and of their type."""

    embedding: Tensor
    """[V, E]"""
    norm: Tensor
    """[E]"""
    head: Tensor
    """[V, E]"""


class DecoderCPU:
    """The weights, ready as C arguments; keeps them alive. They may change in place, not move."""

    def __init__(
        self, layers: Sequence[LayerWeights], ends: EndWeights, num_kv_heads: int, head_dim: int, epsilon: float
    ) -> None:
        self._layers, self._ends = tuple(layers), ends
        self._array = (DecoderLayerArgs * len(layers))(*map(_layer_args, layers))
        first = layers[0]
        self._hidden, self._feed_forward = first.down[0].shape
        self._heads_width = first.qkv[0].shape[0]
        self.num_heads = first.output[0].shape[1] // head_dim
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self._call = loaded_library().forward
        self.dtype = first.down[0].dtype
        self.vocab = ends.head.shape[0]
        self.args = DecoderArgs(
            layers=ctypes.addressof(self._array), embedding=ends.embedding.data_ptr(), norm=ends.norm.data_ptr(),
            head=ends.head.data_ptr(), count=len(layers), hidden=self._hidden, feed_forward=self._feed_forward,
            vocab=self.vocab, epsilon=epsilon, is_bf16=self.dtype == torch.bfloat16,
        )  # fmt: skip

    def __call__(self, input_ids: Tensor, angles: Angles, step: PagedStep, logit_rows: Tensor) -> Tensor:
        """Logits [W, V] float32 of the rows logit_rows [W] int64; the keys and values go into the step's cache.

        input_ids [T] int64. All of the weights' type, as the cache. Raises `ValueError` where shapes disagree and
        `IndexError` where an id is no token.
        """
        logits = torch.empty(len(logit_rows), self.vocab)
        args, _buffers = self.prepare(len(input_ids), len(logit_rows), angles, step)
        args.ids, args.logit_rows, args.logits = input_ids.data_ptr(), logit_rows.data_ptr(), logits.data_ptr()
        if not self._call(self.args, args, step.args):
            raise IndexError(f"an id is not below {self.vocab}")
        return logits

    def prepare(self, rows: int, wanted: int, angles: Angles, step: PagedStep) -> tuple[DecoderStepArgs, Tensor]:
        """Arguments of a step of T rows but for ids and logits, and the memory that they point into besides.

        Completes `step.args`. Raises `ValueError` where shapes disagree.
        """
        args, heads, kv_heads, width = step.args, self.num_heads, self.num_kv_heads, self.head_dim
        half = angles.check(rows, self.dtype, width)
        if (args.kv_heads, args.width) != (kv_heads, width):
            raise ValueError(f"the cache must have {kv_heads} heads of {width}, has {args.kv_heads} of {args.width}")
        # One allocation, because fresh memory costs a page fault per 4 KiB.
        widths = (self._hidden, self._heads_width, heads * width, self._feed_forward, 2 * half)
        buffers = torch.empty(rows * sum(widths) + max(rows, wanted) * self._hidden, dtype=self.dtype)
        size = buffers.itemsize
        x, qkv, mixed, gated, turns, normed = accumulate(
            (rows * part * size for part in widths), initial=buffers.data_ptr()
        )
        key = qkv + heads * width * size
        args.query, args.key, args.value = qkv, key, key + kv_heads * width * size
        args.query_stride = args.key_stride = args.value_stride = self._heads_width
        args.output, args.sinks, args.softcap = mixed, None, 0.0
        args.heads, args.value_width, args.scale = heads, width, width**-0.5
        shared = DecoderStepArgs(
            x=x, normed=normed, heads=qkv, gated=gated, turns=turns, cos=angles.cos.data_ptr(),
            sin=angles.sin.data_ptr(), angle_rows=None if angles.rows is None else angles.rows.data_ptr(),
            rows=rows, wanted=wanted, half=half, table_layer=step.table_layer, kept_layer=step.kept_layer,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        return shared, buffers


def _layer_args(layer: LayerWeights) -> DecoderLayerArgs:
    matrices = {name: _matrix(*getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")}
    return DecoderLayerArgs(
        attention_norm=layer.attention_norm.data_ptr(),
        mlp_norm=layer.mlp_norm.data_ptr(),
        head_norm=None if layer.head_norm is None else layer.head_norm.data_ptr(),
        window=window_argument(layer.window),
        **matrices,
    )


def _matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    return Matrix(weight.data_ptr(), None if bias is None else bias.data_ptr())
