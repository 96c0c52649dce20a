"""The Llama decoder that `pretrain` trains: a lean module whose parameter names are those of Hugging Face.

It exists because a training step on a CPU is bound by memory traffic: one function from token ids to the weighted
loss compiles into a few fused loops, which a general model class does not. The numbers are the same: a test holds
its logits against `transformers.LlamaForCausalLM` loaded from an export. Shapes: B sequences, T tokens each, H query
heads, K key/value heads, D head dim, E hidden size, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the decoder; the defaults are those of `quire-mini`."""

    vocab_size: int = 8192
    hidden: int = 448
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 1024
    context: int = 4096  # positions the rotary tables cover
    rope_theta: float = 1e10  # so large that 40 of 64 rotary pairs hardly turn within the context
    norm_eps: float = 1e-5

    def as_dict(self) -> dict[str, float]:
        """Plain values for a checkpoint or a model card."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root mean square norm; statistics in float32, result in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


class Linear(nn.Linear):
    """Linear map without bias whose float32 weight is cast to the input's dtype (bfloat16 in training)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n_in] -> [..., n_out]."""
        return F.linear(x, self.weight.to(x.dtype))


def rotary_frequencies(shape: Shape) -> Tensor:
    """Angle per position of each rotary pair, [D/2] float64, falling from 1 to about 1/rope_theta."""
    pair = torch.arange(shape.head_dim // 2, dtype=torch.float64)
    return shape.rope_theta ** (-2.0 * pair / shape.head_dim)


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, D] in the half-split layout of Llama."""
    angle = torch.outer(torch.arange(shape.context, dtype=torch.float64), rotary_frequencies(shape)).float()
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, heads, T, D] with tables [T, D] of x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, E], tables [T, D] -> [B, T, E]."""
        batch, length, _ = x.shape
        s = self.shape
        q = self.q_proj(x).view(batch, length, s.heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, s.heads * s.head_dim))


class MLP(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.mlp)
        self.up_proj = Linear(shape.hidden, shape.mlp)
        self.down_proj = Linear(shape.mlp, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, E] -> [B, T, E]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, E] -> [B, T, E]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The decoder with tied embeddings; `loss` is what training compiles."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        cos, sin = rotary_tables(shape)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def block(self, index: int) -> Block:
        """Layer number `index`."""
        layer = self.layers[index]
        assert isinstance(layer, Block)
        return layer

    def hidden(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Last hidden states after the final norm: ids [B, T] -> [B, T, E] of `dtype`."""
        length = ids.shape[1]
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        x = F.embedding(ids, self.embed_tokens.weight).to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [B, T, V] of `dtype` for ids [B, T]."""
        return F.linear(self.hidden(ids, dtype), self.embed_tokens.weight.to(dtype))

    @torch.inference_mode()
    def last_logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits [B, last, V] of the last positions in bfloat16 compute, for evaluation; ids [B, T]."""
        weight = self.embed_tokens.weight
        states = self.hidden(ids.to(weight.device), torch.bfloat16)[:, -last:]
        return F.linear(states, weight.to(states.dtype))

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean next-token loss in bfloat16 compute.

        ids [B, T + 1]; weights [B, T] float32, the weight of predicting ids[:, 1:].
        """
        logits = self.forward(ids[:, :-1], torch.bfloat16).flatten(0, 1).float()
        per_token = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        flat = weights.flatten()
        return (per_token * flat).sum() / flat.sum().clamp_min(1.0)
