"""A draft's passes in one call draw the tokens, and store the entries, of passes made one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quire.models.native import NativeRunner
from quire.models.placement import Placement
from quire.models.runner import ModelRunner
from quire.speculation.chain import draft_chain, single_rows
from quire.speculation.draft_cache import DraftCache, DraftLayout
from quire.speculation.drafter import Draw

from ..models.conftest import CPU, VOCAB, make_checkpoint
from ..speculation.world import GreedyDraw

SLOTS, DEPTH, PAGE = 5, 6, 4
MOST = np.array([6, 6, 4, 2, 1], np.int32)
MODELS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}


def run(runner: ModelRunner, place: Placement, draw: Draw) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens of ragged sequences, and all that has changed: cache, positions, kept lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = np.array([9, 3, 0, 6, 1], np.int32)
    cache = DraftCache(DraftLayout(SLOTS, 20, PAGE, 200), runner.spec, place)
    assert cache.reserve(np.arange(SLOTS, dtype=np.int32), lengths + DEPTH, {}).all()
    cache.pool.normal_(generator=generator)
    at = torch.from_numpy(lengths.astype(np.int64))
    tables = cache.tables(torch.arange(SLOTS), at, 20)
    context = single_rows(cache.pool, cache.entry_positions, tables, at.clone(), 20, place.backend)
    logits = torch.randn((SLOTS, VOCAB), generator=generator)
    tokens = draft_chain(
        runner, logits, context, torch.full((SLOTS,), 20), np.arange(SLOTS, dtype=np.int32), MOST, draw
    )
    return tokens, [cache.pool, cache.entry_positions, tables[1], context.positions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_one_call_is_the_same_as_many(tmp_path, kind, dtype):
    place = replace(CPU, dtype=dtype)
    runner = make_checkpoint(tmp_path, kind, MODELS[kind]).load(place=place)
    together, apart = (GreedyDraw(MOST, VOCAB, whole=whole) for whole in (True, False))
    (tokens, state), (expected, wanted) = (run(runner, place, draw) for draw in (together, apart))
    assert together.drawn.tolist() == [0] * SLOTS and apart.drawn.tolist() == MOST.tolist()
    assert torch.equal(tokens, expected)
    assert ((tokens >= 0).sum(0) == torch.from_numpy(MOST)).all()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(state[:2], wanted[:2], strict=True))
    # The first sequence takes part in every pass; the counters of the others may end where they like.
    assert all(torch.equal(mine[0], theirs[0]) for mine, theirs in zip(state[2:], wanted[2:], strict=True))


@torch.inference_mode()
def test_what_one_call_cannot_do_is_done_pass_by_pass(tmp_path):
    """Frequencies that depend on a sequence's length have no table."""
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    runner = make_checkpoint(tmp_path, "llama", MODELS["llama"] | scaling).load()
    assert isinstance(runner, NativeRunner)
    none = torch.empty(0)
    context = single_rows(none, none, (none, none), torch.arange(3), 4, "cpu")
    assert runner.chain(context, 2) is None
