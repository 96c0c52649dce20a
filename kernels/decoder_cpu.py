"""All layers of a gated decoder in one call of cpu_decoder.cpp: what they compute is that of the functions one by one.

For a step that nobody looks into between the layers. Letters: T rows, E hidden size, H query heads, K kv heads, D head
dim, F feed-forward size, R rotated entries of a head.

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
from .cpu_library import DecoderLayerArgs, DecoderStepArgs, Matrix, loaded_library


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


class DecoderCPU:
    """The layers' weights, ready as C arguments; keeps them alive. They may change in place, not move."""

    def __init__(self, layers: Sequence[LayerWeights], num_kv_heads: int, head_dim: int, epsilon: float) -> None:
        self._layers = tuple(layers)
        self._array = (DecoderLayerArgs * len(layers))(*map(_layer_args, layers))
        first = layers[0]
        self._hidden, self._feed_forward = first.down[0].shape
        self._heads_width = first.qkv[0].shape[0]
        self._num_heads = first.output[0].shape[1] // head_dim
        self._num_kv_heads, self._head_dim, self._epsilon = num_kv_heads, head_dim, epsilon
        self.dtype = first.down[0].dtype

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, step: PagedStep) -> None:
        """Replace x [T, E], contiguous, by the last layer's output; the keys and values go into the step's cache.

        cos, sin [T, R / 2], contiguous. All of the weights' type, as the cache. Raises `ValueError` where shapes
        disagree.
        """
        rows = x.shape[0]
        if x.shape != (rows, self._hidden) or x.dtype != self.dtype:
            raise ValueError(f"x must be {self.dtype} [T, {self._hidden}], got {x.dtype} {list(x.shape)}")
        if len(cos) != rows:
            raise ValueError(f"cos and sin must have {rows} rows, got {len(cos)}")
        shared, _buffers = self.prepare(x, cos, sin, step)
        loaded_library().decoder(*self.layers, shared, step.args)

    @property
    def layers(self) -> tuple[int, int]:
        """Address and number of the layers, for C."""
        return ctypes.addressof(self._array), len(self._layers)

    def prepare(self, x: Tensor, cos: Tensor, sin: Tensor, step: PagedStep) -> tuple[DecoderStepArgs, Tensor]:
        """Arguments of a step whose rows are those of x [T, E], and the memory that they point into besides.

        cos, sin [any, R / 2]; completes `step.args`. Raises `ValueError` where shapes disagree.
        """
        rows = x.shape[0]
        args, heads, kv_heads, width = step.args, self._num_heads, self._num_kv_heads, self._head_dim
        if cos.shape != sin.shape or 2 * cos.shape[1] > width or cos.dtype != x.dtype:
            raise ValueError(f"cos and sin must be {x.dtype} [.., <= {width // 2}], got {list(cos.shape)}")
        if (args.kv_heads, args.width) != (kv_heads, width):
            raise ValueError(f"the cache must have {kv_heads} heads of {width}, has {args.kv_heads} of {args.width}")
        # One allocation, because fresh memory costs a page fault per 4 KiB.
        widths = (self._hidden, self._heads_width, heads * width, self._feed_forward)
        buffers = torch.empty(rows * sum(widths), dtype=x.dtype)
        normed, qkv, mixed, gated = accumulate(
            (rows * part * x.itemsize for part in widths[:-1]), initial=buffers.data_ptr()
        )
        key = qkv + heads * width * x.itemsize
        args.query, args.key, args.value = qkv, key, key + kv_heads * width * x.itemsize
        args.query_stride = args.key_stride = args.value_stride = self._heads_width
        args.output, args.sinks, args.softcap = mixed, None, 0.0
        args.heads, args.value_width, args.scale = heads, width, width**-0.5
        shared = DecoderStepArgs(
            x=x.data_ptr(), normed=normed, heads=qkv, gated=gated, cos=cos.data_ptr(), sin=sin.data_ptr(),
            rows=rows, hidden=self._hidden, feed_forward=self._feed_forward, half=cos.shape[1],
            table_layer=step.table_layer, kept_layer=step.kept_layer, epsilon=self._epsilon,
            is_bf16=x.dtype == torch.bfloat16, threads=torch.get_num_threads(),
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
