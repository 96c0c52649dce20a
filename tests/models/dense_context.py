"""A dense stand-in for the paged `AttentionContext`: keeps each sequence's keys and values as they come.

Unlike the loader's own probe it remembers earlier steps, so chunked prompts and decoding can be tested. Attention is
written row by row, on purpose unlike any of the implementations it judges.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quire.models.context import AttentionContext
from quire.models.runner import ModelRunner


@dataclass
class DenseCache:
    """Keys and values of each sequence (by number) and layer, each [n, K, D]."""

    entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, sequence: int, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new entries; returns all of them."""
        if (sequence, layer) in self.entries:
            old_key, old_value = self.entries[sequence, layer]
            key, value = torch.cat([old_key, key]), torch.cat([old_value, value])
        self.entries[sequence, layer] = key, value
        return key, value


@dataclass
class DenseContext:
    """One step: `rows` new tokens of each of `sequences`, over `cache`."""

    cache: DenseCache
    sequences: list[int]
    rows: list[int]
    layers_seen: list[int] = field(default_factory=list)

    def whole_step(self, scale, dtype):
        """See `AttentionContext.whole_step`: layers come one by one."""

    def attend(self, layer, query, key, value, *, scale, window=None, softcap=None, sinks=None, rotation=None):
        """See `AttentionContext.attend`."""
        if rotation is not None:
            rotation.apply("reference")
        self.layers_seen.append(layer)
        outputs = []
        parts = zip(*(t.split(self.rows) for t in (query, key, value)), strict=True)
        for sequence, (q, k, v) in zip(self.sequences, parts, strict=True):
            keys, values = self.cache.append(sequence, layer, k, v)
            first = keys.shape[0] - q.shape[0]
            for row in range(q.shape[0]):
                end = first + row + 1
                begin = 0 if window is None else max(0, end - window)
                outputs.append(_attend_row(q[row], keys[begin:end], values[begin:end], scale, softcap, sinks))
        return torch.stack(outputs)


def _attend_row(query, keys, values, scale, softcap, sinks):
    """[H, D], [n, K, D], [n, K, Dv] -> [H, Dv]."""
    heads, kv_heads = query.shape[0], keys.shape[1]
    owner = torch.arange(heads) // (heads // kv_heads)
    scores = (query[None] * keys[:, owner]).sum(-1).T * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None]], dim=1)
    weights = scores.softmax(-1)[:, : keys.shape[0]]
    return (weights.T[..., None] * values[:, owner]).sum(0)


@dataclass
class Chunk:
    """New tokens of one sequence."""

    sequence: int
    ids: Tensor
    start: int
    length: int
    """Most tokens the sequence can reach."""


@torch.inference_mode()
def run_step(runner: ModelRunner, cache: DenseCache, chunks: list[Chunk]) -> list[Tensor]:
    """All logits [n, V] of each chunk, computed as one flattened batch; every layer must have attended once."""
    context = DenseContext(cache, [c.sequence for c in chunks], [len(c.ids) for c in chunks])
    positions = torch.cat([torch.arange(c.start, c.start + len(c.ids)) for c in chunks])
    lengths = torch.cat([torch.full((len(c.ids),), c.length) for c in chunks])
    ids = torch.cat([c.ids for c in chunks])
    logits = runner.forward(ids, positions, lengths, cast(AttentionContext, context), torch.arange(len(ids)))
    assert sorted(context.layers_seen) == list(range(runner.spec.num_layers))
    return list(logits.split(context.rows))


def check_parity(runner: ModelRunner, model: PreTrainedModel, vocab: int, tolerance: float = 1e-4) -> None:
    """Logits of a batch of three sequences, partly in chunks and decode steps, against `model`'s own, one by one."""
    seeded = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocab, (length,), generator=seeded) for length in (23, 9, 14)]
    with torch.inference_mode():
        expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in prompts]
    cache = DenseCache()
    # The first sequence comes whole, the second in two chunks, the third in a chunk and two single tokens.
    steps = [[(0, 0, 23), (1, 0, 4), (2, 0, 12)], [(2, 12, 13), (1, 4, 9)], [(2, 13, 14)]]
    for step in steps:
        chunks = [Chunk(s, prompts[s][a:b], a, len(prompts[s])) for s, a, b in step]
        for (s, a, b), logits in zip(step, run_step(runner, cache, chunks), strict=True):
            torch.testing.assert_close(logits, expected[s][a:b], atol=tolerance, rtol=tolerance)
            assert logits.argmax(-1).tolist() == expected[s][a:b].argmax(-1).tolist()
