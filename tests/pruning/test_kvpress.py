"""The same entries stay as in NVIDIA's kvpress, policy by policy, on a small random model; see `make test-kvpress`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quire.core.pruning import PruneParams
from quire.kernels.backend import resolve_backend
from quire.kernels.paged_rows import PagedRows
from quire.pruning.policy import LayerView
from quire.pruning.refine import CHUNK
from quire.pruning.select import select
from quire.pruning.table import make_policy

from .test_select import kept_sets

pytestmark = pytest.mark.slow
kvpress = pytest.importorskip("kvpress")

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 16
SINKS = 4
VOCABULARY = 1024


def make_model(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * DIM, intermediate_size=96, num_hidden_layers=LAYERS, head_dim=DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def tokens(count: int) -> Tensor:
    """All different: the first layer's keys of equal tokens would have equal norms."""
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[None, :count]


@contextmanager
def hidden_states(model: LlamaForCausalLM) -> Iterator[list[Tensor]]:
    """What enters each attention layer."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def held(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values [K, E, D] of a layer."""
    layer: Any = cache.layers[index]
    return layer.keys[0], layer.values[0]


@torch.no_grad()
def observe(count: int, window: int) -> list[LayerView]:
    """The model's unpruned cache and all that a policy can ask for."""
    model, cache = make_model("eager"), DynamicCache()
    with hidden_states(model) as hidden:
        output = model(tokens(count), past_key_values=cache, output_attentions=True)

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
        return cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]

    views = []
    for index, layer in enumerate(model.model.layers):
        queries = layer.self_attn.q_proj(hidden[index]).view(count, HEADS, DIM)
        keys, values = held(cache, index)
        centred = queries[SINKS:] - queries[SINKS:].mean(0)
        cos, sin = (part[:, None] for part in rotation(torch.arange(count)))
        first, second = queries.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        views.append(
            LayerView(
                layer=index,
                stored_keys=PagedRows.of(keys),
                stored_values=PagedRows.of(values),
                stored_positions=PagedRows.of(torch.arange(count, dtype=torch.int32).repeat(KV_HEADS, 1)),
                lengths=torch.full((KV_HEADS,), count),
                backend=resolve_backend(keys.device, keys.dtype),
                num_tokens=count,
                scale=DIM**-0.5,
                queries=turned[-window:],
                query_positions=torch.arange(count - window, count),
                mass=output.attentions[index][0].sum(1).view(KV_HEADS, -1, count).sum(1),
                seen=torch.arange(count, 0, -1).float().repeat(KV_HEADS, 1),
                query_mean=queries[SINKS:].mean(0),
                query_covariance=torch.einsum("nhi,nhj->hij", centred, centred) / len(centred),
                rotation=rotation,
                output_weight=layer.self_attn.o_proj.weight,
            )
        )
    return views


@torch.no_grad()
def theirs(press: Any, views: list[LayerView], attention: str = "sdpa") -> list[list[set[int]]]:
    """[layer][head] -> what kvpress keeps: read off its cache, or off the entries that it masks."""
    model, cache = make_model(attention), DynamicCache()
    count = views[0].keys.shape[1]
    with press(model):
        model(tokens(count), past_key_values=cache)
    result = []
    for index, layer in enumerate(model.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            heads = [set(range(count)) - set(masked[2][masked[1] == k].tolist()) for k in range(KV_HEADS)]
        else:
            kept = torch.cdist(held(cache, index)[0], views[index].keys).argmin(-1)
            heads = [set(row.tolist()) for row in kept]
        result.append(heads)
    return result


def ours(views: list[LayerView], target: int, **params: Any) -> list[list[set[int]]]:
    asked = PruneParams(**params)
    return kept_sets(select(make_policy(asked), views, asked, target))


def unprotected(views: list[LayerView]) -> list[LayerView]:
    """As if another token were to come: so that a window of one protects nothing, as kvpress has it."""
    return [replace(view, num_tokens=view.num_tokens + 1) for view in views]


def ratio(count: int, kept: int) -> float:
    """The compression ratio at which kvpress keeps `kept` of `count`."""
    return 1 - (kept + 0.5) / count


def test_streaming_llm() -> None:
    views = observe(200, 1)
    press = kvpress.StreamingLLMPress(compression_ratio=ratio(200, 80), n_sink=SINKS)
    assert ours(views, 80, policy="window", sinks=SINKS, window=1) == theirs(press, views)


@pytest.mark.parametrize(("policy", "press"), [("knorm", "KnormPress"), ("keydiff", "KeyDiffPress")])
def test_keys_alone(policy: str, press: str) -> None:
    views = observe(200, 1)
    expected = theirs(getattr(kvpress, press)(compression_ratio=ratio(200, 80)), views)
    assert ours(unprotected(views), 80, policy=policy, sinks=0, window=1) == expected


def test_lagkv() -> None:
    """Three ranked partitions; the cut falls between two ranks."""
    count = SINKS + 4 * 128 + 9
    kept = SINKS + 128 + 9 + 3 * 50
    views = observe(count, 1)
    press = kvpress.LagKVPress(compression_ratio=ratio(count, kept), n_sink=SINKS)
    assert ours(views, kept, policy="lagkv", sinks=SINKS, window=1) == theirs(press, views)


def test_tova() -> None:
    views = observe(200, 1)
    expected = theirs(kvpress.TOVAPress(compression_ratio=ratio(200, 80)), views)
    assert ours(views, 80, policy="tova", sinks=0, window=1) == expected


def test_snapkv() -> None:
    views = observe(200, 32)
    expected = theirs(kvpress.SnapKVPress(compression_ratio=ratio(200, 80), window_size=32), views)
    assert ours(views, 80, policy="snapkv", sinks=0, window=32) == expected


def test_observed_attention() -> None:
    views = observe(200, 1)
    expected = theirs(kvpress.ObservedAttentionPress(compression_ratio=ratio(200, 80)), views, "eager")
    assert ours(unprotected(views), 80, policy="h2o", sinks=0, window=1) == expected


def test_expected_attention() -> None:
    """kvpress may drop the newest entry, which always stays here: in place of the worst of the others."""
    views = observe(200, 1)
    press = kvpress.ExpectedAttentionPress(compression_ratio=ratio(200, 80), n_sink=SINKS)
    kept = ours(views, 80, policy="expected", sinks=SINKS, window=1)
    for layer, others in zip(kept, theirs(press, views), strict=True):
        for mine, other in zip(layer, others, strict=True):
            assert mine - other <= {199} and len(mine) == len(other)


class _Tokenizer:
    """What KVzip's press asks a tokenizer for: the instruction to repeat, and what ends the user's turn."""

    chat_template = None

    def encode(self, text: str, **options: Any) -> Tensor:
        """The instruction to repeat is five tokens here; the end of the turn one; nothing none."""
        return torch.arange(VOCABULARY - 9, VOCABULARY)[: {"": 0, "\n": 1}.get(text, 5)][None]


@torch.no_grad()
def repeated(views: list[LayerView]) -> list[LayerView]:
    """The views after the model was told to repeat all of it, and did: one chunk, with the press's instruction."""
    count, tokenizer = views[0].num_tokens, _Tokenizer()
    told = torch.cat([tokenizer.encode("repeat"), tokenizer.encode("\n")], dim=1)
    output = make_model("eager")(torch.cat([tokens(count), told, tokens(count)], dim=1), output_attentions=True)
    seen = [weights[0, :, count:, :count].amax(1).view(KV_HEADS, -1, count).amax(1) for weights in output.attentions]
    return [replace(view, repeated=most) for view, most in zip(views, seen, strict=True)]


def test_kvzip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all heads and layers at once."""
    module = importlib.import_module("kvpress.presses.kvzip_press")
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda name: _Tokenizer())
    views = observe(200, 1)
    expected = theirs(kvpress.KVzipPress(compression_ratio=0.6, n_sink=SINKS), views)
    kept = ours(unprotected(repeated(views)), 80, policy="kvzip", budget="global", sinks=SINKS, window=1)
    assert len({len(head) for layer in kept for head in layer}) > 1
    assert kept == expected


def test_pyramid() -> None:
    """Numbers at which kvpress's rounding and ours agree: 312, 160 and 8 of 400."""
    views = observe(400, 4)
    expected = theirs(kvpress.PyramidKVPress(compression_ratio=0.6, window_size=4), views)
    kept = ours(views, 160, policy="snapkv", budget="pyramid", sinks=0, window=4)
    assert [len(heads[0]) for heads in kept] == [312, 160, 8]
    assert kept == expected


def test_ada() -> None:
    views = observe(200, 32)
    press = kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio(200, 80), window_size=32))
    kept = ours(views, 80, policy="snapkv", budget="ada", sinks=0, window=32)
    assert len(kept[0][0]) != len(kept[0][1])
    assert kept == theirs(press, views)


def test_critical() -> None:
    views = observe(200, 32)
    press = kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=ratio(200, 80), window_size=32))
    kept = ours(views, 80, policy="snapkv", refine=("value-norm",), sinks=0, window=32)
    assert kept != ours(views, 80, policy="snapkv", sinks=0, window=32)
    assert kept == theirs(press, views)


def test_chunks() -> None:
    views = observe(15 * CHUNK, 1)
    inner = kvpress.KnormPress(compression_ratio=ratio(15 * CHUNK, 6 * CHUNK))
    kept = ours(unprotected(views), 6 * CHUNK, policy="knorm", refine=("chunk",), sinks=0, window=1)
    assert kept == theirs(kvpress.ChunkKVPress(inner, chunk_length=CHUNK), views)
