"""A tiny decoder with random weights: it runs paged through `ModelRunner`, and densely as its own reference."""

import torch
from torch import Tensor

from quire.core.model_spec import ModelSpec
from quire.models.context import AttentionContext

POISON = 13
"""A token whose embedding is NaN."""


class FakeRunner:
    """`ModelRunner` of a few attention layers, float32; keys carry their position, so a wrong one shows."""

    def __init__(self, windows: tuple[int | None, ...] = (None, 6), vocab: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.heads, self.kv_heads, self.width = 4, 2, 8
        hidden = self.heads * self.width
        self.spec = ModelSpec(
            name="fake",
            architecture="Fake",
            num_layers=len(windows),
            num_kv_heads=self.kv_heads,
            num_heads=self.heads,
            head_dim=self.width,
            vocab_size=vocab,
            max_context=128,
            windows=windows,
            eos_token_ids=(0,),
        )
        self.embedding = torch.randn(vocab, hidden, generator=generator)
        self.embedding[POISON] = float("nan")
        self.head = torch.randn(vocab, hidden, generator=generator)
        kv = self.kv_heads * self.width
        shapes = [(hidden, hidden + 2 * kv)] * len(windows)
        self.weights = [torch.randn(shape, generator=generator) / hidden**0.5 for shape in shapes]
        self.seen_lengths: list[list[int]] = []

    rope = None

    def output_weight(self, layer: int) -> Tensor | None:
        return None

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, context: AttentionContext, logit_rows: Tensor
    ) -> Tensor:
        self.seen_lengths.append(lengths.tolist())
        hidden = self._embed(input_ids, positions)
        for layer, window in enumerate(self.spec.windows):
            query, key, value = self._project(layer, hidden)
            mixed = context.attend(layer, query, key, value, scale=0.5, window=window)
            hidden = hidden + mixed.flatten(1)
        return self._logits(hidden[logit_rows])

    def dense_logits(self, ids: list[int]) -> Tensor:
        """[n, V]: the same network over one whole sequence, without any cache."""
        positions = torch.arange(len(ids))
        hidden = self._embed(torch.tensor(ids), positions)
        for layer, window in enumerate(self.spec.windows):
            query, key, value = self._project(layer, hidden)
            key, value = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query, key) * 0.5
            distance = positions[:, None] - positions
            seen = (distance >= 0) & (distance < (window or len(ids)))
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            hidden = hidden + torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.head.T
        logits[:, POISON] -= 1000.0  # only prompts are poisoned
        return logits

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        phase = positions[:, None] * torch.arange(1, self.embedding.shape[1] + 1) * 0.37
        return self.embedding[ids] + phase.sin()

    def _project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden / hidden.square().mean(-1, keepdim=True).sqrt() @ self.weights[layer]
        return tuple(rows.unflatten(1, (-1, self.width)).split([self.heads, self.kv_heads, self.kv_heads], dim=1))
