"""The layers of the native decoder family, on flattened batches: no padding, no batch axis, no autograd.

Letters: T rows of the step, E hidden size, H query heads, K kv heads, D head dim, F feed-forward size. Rounding
follows the library's own modelling code (norms in float32 and cast before the weight, rotation in the model's type),
so that greedy text in 16-bit types parts from it as rarely as possible. The layers are plain callables: a decode step
makes about forty calls, and those of `nn.Module` would cost as much as the arithmetic of a small model.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial

import torch.nn.functional as F
from torch import Tensor

from ..kernels.append_rotated import Rotation
from ..kernels.attention_cpu import PagedStep
from ..kernels.backend import TRITON_BACKENDS
from ..kernels.decode_step_cpu import Cosines, DecodeStepCPU, SlotTables
from ..kernels.decoder_cpu import DecoderCPU, EndWeights, LayerWeights
from ..kernels.draft_chain_cpu import DrawRules, draft_chain_cpu
from ..kernels.linear import gated_linear, linear
from ..kernels.norm import add_rms_norm
from ..kernels.rotary import Angles
from .context import AttentionContext
from .placement import Placement

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
}
"""By the name that configurations use (the library's own table would cost a second of imports)."""


Chain = Callable[[Tensor, Sequence[int], Tensor, DrawRules], None]
"""`draft_chain_cpu` in a given context: tokens, active, logits, rules."""
Stream = tuple[Tensor, Tensor | None]
"""The residual stream [T, E], and what of it waits to be added by the next norm, in the pass that reads it anyway."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes and switches that all layers of a model share."""

    hidden: int
    feed_forward: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each query and key head before rotation (Qwen3)."""


class Linear:
    """y = x W^T (+ b); weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Placement) -> None:
        self.weight = place.parameter(outputs, inputs)
        self.bias = place.parameter(outputs) if bias else None
        self.backend = place.backend

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return linear(x, self.weight, self.bias, backend=self.backend)

    def onto(self, residual: Tensor, x: Tensor) -> Stream:
        """[T, in] -> the sum of `residual` [T, out] and [T, out]: made at once where the product's kernel can."""
        if self.backend in TRITON_BACKENDS:
            return residual, self(x)
        return linear(x, self.weight, self.bias, residual=residual, backend=self.backend), None


class RMSNorm:
    """See `kernels.norm`."""

    def __init__(self, width: int, epsilon: float, place: Placement) -> None:
        self.weight = place.parameter(width)
        self.epsilon = epsilon
        self.backend = place.backend

    def __call__(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """[T, width] normalised, and the stream with nothing left to add."""
        return add_rms_norm(*stream, self.weight, self.epsilon, self.backend)


class Attention:
    """Self-attention over the paged cache, with one fused projection for queries, keys and values.

    `qkv.weight` holds H query heads, then K key heads, then K value heads, each of D rows. `qk_weight` [H + K, D]
    holds the norm weight of every query and key head (equal within each kind), so that one pass normalises both.
    """

    def __init__(self, layer: int, shape: LayerShape, window: int | None, place: Placement) -> None:
        self.layer = layer
        self.shape = shape
        self.window = window
        self.scale = shape.head_dim**-0.5
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = Linear(shape.hidden, rows, shape.qkv_bias, place)
        self.output = Linear(shape.num_heads * shape.head_dim, shape.hidden, shape.output_bias, place)
        rotated = shape.num_heads + shape.num_kv_heads
        self.qk_weight = place.parameter(rotated, shape.head_dim) if shape.qk_norm else None

    def share_norm_weights(self) -> None:
        """Give the norm weight of the first query (key) head to all others; called once after loading."""
        if self.qk_weight is not None:
            for weights in self.qk_weight.split([self.shape.num_heads, self.shape.num_kv_heads]):
                weights.copy_(weights[:1].expand_as(weights).clone())

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext, residual: Tensor) -> Stream:
        """[T, E], plus `residual` -> [T, E]; cos and sin [T, R / 2]. Stores the rows' keys and values in the cache."""
        shape = self.shape
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], -1, shape.head_dim)
        query_key, value = heads.split_with_sizes([num_heads + num_kv_heads, num_kv_heads], 1)
        query, key = query_key.split_with_sizes([num_heads, num_kv_heads], 1)
        rotation = Rotation(query_key, cos, sin, self.qk_weight, shape.norm_epsilon)
        mixed = context.attend(self.layer, query, key, value, scale=self.scale, window=self.window, rotation=rotation)
        return self.output.onto(residual, mixed.view(x.shape[0], -1))


class GatedMLP:
    """down(act(gate(x)) * up(x)); `gate_up.weight` holds F gate rows, then F up rows (Shazeer 2020)."""

    def __init__(self, shape: LayerShape, activation: Activation, place: Placement) -> None:
        self.gate_up = Linear(shape.hidden, 2 * shape.feed_forward, shape.mlp_bias, place)
        self.down = Linear(shape.feed_forward, shape.hidden, shape.mlp_bias, place)
        self.activation = activation

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        """[T, E], plus `residual` -> [T, E]."""
        if self.activation is F.silu:
            both = self.gate_up
            return self.down.onto(residual, gated_linear(x, both.weight, both.bias, backend=both.backend))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down.onto(residual, self.activation(gate) * up)


class DecoderLayer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, layer: int, shape: LayerShape, activation: Activation, window: int | None, place: Placement
    ) -> None:
        self.attention_norm = RMSNorm(shape.hidden, shape.norm_epsilon, place)
        self.attention = Attention(layer, shape, window, place)
        self.mlp_norm = RMSNorm(shape.hidden, shape.norm_epsilon, place)
        self.mlp = GatedMLP(shape, activation, place)

    def __call__(self, stream: Stream, cos: Tensor, sin: Tensor, context: AttentionContext) -> Stream:
        """[T, E] -> [T, E]."""
        x, residual = self.attention_norm(stream)
        x, residual = self.mlp_norm(self.attention(x, cos, sin, context, residual))
        return self.mlp(x, residual)

    def weights(self) -> LayerWeights:
        """For the kernel that computes all layers."""
        attention, mlp = self.attention, self.mlp
        return LayerWeights(
            attention_norm=self.attention_norm.weight,
            mlp_norm=self.mlp_norm.weight,
            head_norm=attention.qk_weight,
            qkv=(attention.qkv.weight, attention.qkv.bias),
            output=(attention.output.weight, attention.output.bias),
            gate_up=(mlp.gate_up.weight, mlp.gate_up.bias),
            down=(mlp.down.weight, mlp.down.bias),
            window=attention.window,
        )


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """A model's two matrices over the vocabulary, [V, E] each; one and the same where they are tied."""

    embedding: Tensor
    head: Tensor

    @staticmethod
    def fresh(vocab_size: int, hidden: int, tied: bool, place: Placement) -> "TokenWeights":
        """Uninitialised ones; loading fills them."""
        embedding = place.parameter(vocab_size, hidden)
        return TokenWeights(embedding, embedding if tied else place.parameter(vocab_size, hidden))


class Decoder:
    """Embedding, layers, final norm and output head."""

    def __init__(
        self,
        shape: LayerShape,
        activation: Activation,
        windows: tuple[int | None, ...],
        tokens: TokenWeights,
        place: Placement,
    ) -> None:
        self.embedding, self.head = tokens.embedding, tokens.head
        self.layers = [DecoderLayer(index, shape, activation, window, place) for index, window in enumerate(windows)]
        self.norm = RMSNorm(shape.hidden, shape.norm_epsilon, place)
        self.backend = place.backend
        self._shape = shape
        self._fusible = place.backend == "cpu" and activation is F.silu

    @cached_property
    def _fused(self) -> DecoderCPU:
        """All of this in one call."""
        weights = [layer.weights() for layer in self.layers]
        ends, shape = EndWeights(self.embedding, self.norm.weight, self.head), self._shape
        return DecoderCPU(weights, ends, shape.num_kv_heads, shape.head_dim, shape.norm_epsilon)

    def first(self, count: int) -> "Decoder":
        """A decoder of the first `count` layers, then norm and head; the weights are these."""
        part = copy(self)
        vars(part).pop("_fused", None)
        part.layers = self.layers[:count]
        return part

    def __call__(self, input_ids: Tensor, angles: Angles, context: AttentionContext, logit_rows: Tensor) -> Tensor:
        """input_ids [T] -> logits [R, V] float32 of the rows `logit_rows` [R]."""
        step = self._whole_step(context)
        if step is not None:
            return self._fused(input_ids, angles, step, logit_rows)
        stream: Stream = F.embedding(input_ids, self.embedding), None
        cos, sin = angles.picked()
        for layer in self.layers:
            stream = layer(stream, cos, sin, context)
        last, waiting = (part if part is None else part.index_select(0, logit_rows) for part in stream)
        assert last is not None
        return linear(self.norm((last, waiting))[0], self.head, wide=True, backend=self.backend)

    def chain(self, angles: Angles, context: AttentionContext) -> Chain | None:
        """`draft_chain_cpu` in this context, if that can be done here."""
        step = self._whole_step(context)
        return None if step is None else partial(draft_chain_cpu, self._fused, angles=angles, step=step)

    def decode_step(self, tables: SlotTables, cosines: Cosines) -> DecodeStepCPU | None:
        """What computes decodes of these slots in one call, if that can be done here."""
        if not self._fusible or tables.pool.dtype != self.embedding.dtype:
            return None
        return DecodeStepCPU(self._fused, tables, cosines)

    def _whole_step(self, context: AttentionContext) -> PagedStep | None:
        """For `_fused`, where it can compute the step."""
        if not self._fusible:
            return None
        return context.whole_step(self.layers[0].attention.scale, self.embedding.dtype)

    def parameters(self) -> Iterator[Tensor]:
        """Every weight once."""
        yield self.embedding
        if self.head is not self.embedding:
            yield self.head
        for layer in self.layers:
            linears = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
            norms = (layer.attention_norm.weight, layer.mlp_norm.weight, layer.attention.qk_weight)
            biases = (linear.bias for linear in linears)
            yield from (w for w in (*(linear.weight for linear in linears), *biases, *norms) if w is not None)
        yield self.norm.weight
