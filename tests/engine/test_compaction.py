"""Survivors move to the right places, by either implementation, and nobody else's pages are touched."""

import numpy as np
import pytest
import torch

from quire.core.ids import SlotId
from quire.core.plan import Compaction
from quire.engine.cache import KVCache
from quire.engine.sizing import CacheLayout
from quire.kernels.backend import Backend

SLOT = SlotId(1)
LAYOUT = CacheLayout(
    num_layers=2, num_kv_heads=2, head_dim=8, page_size=4, num_slots=2, max_model_len=32, dtype=torch.float32
)


def filled_cache() -> KVCache:
    """One slot whose heads hold 13 entries each in pages 0 to 15; every key differs."""
    cache = KVCache(LAYOUT, 32, torch.device("cpu"))
    cache.pool.copy_(torch.randn(cache.pool.shape, generator=torch.Generator().manual_seed(0)))
    cache.pool[16:] = float("nan")  # what strangers left
    cache.page_table[SLOT, :, :, :4] = torch.arange(16).view(2, 2, 4)
    cache.entry_positions[:16] = torch.arange(16).view(4, 4).repeat(4, 1)
    cache.kept[SLOT] = 13
    cache._kept_host[SLOT] = 13
    return cache


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("fresh", [False, True])
def test_survivors_are_read_in_their_new_places(fresh: bool, backend: Backend) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    cache = filled_cache()
    before = cache.pool.clone()
    counts = np.array([5, 1, 9, 13], np.int32)
    kept = [torch.randperm(13, generator=torch.Generator().manual_seed(n))[:n].sort().values for n in counts.tolist()]
    keep = torch.full((2, 2, 13), 13, dtype=torch.int32)
    for row, index in enumerate(kept):
        keep.view(4, 13)[row, : len(index)] = index.int()
    pages = np.array([20, 31, 17, 25, 18, 29, 21, 22, 23, 16], np.int32) if fresh else None
    cache.compact(Compaction(SLOT, counts, pages), [0, 1], keep, backend)
    assert cache.counts(SLOT).tolist() == cache.kept[SLOT].flatten().tolist() == counts.tolist()
    for row, index in enumerate(kept):
        table = cache.page_table[SLOT].view(4, -1)[row].long()
        old = torch.arange(row * 4, row * 4 + 4)
        for half in (0, 1):
            now = cache.pool[table, half].flatten(0, 1)[: len(index)]
            assert torch.equal(now, before[old, half].flatten(0, 1)[index])
        assert torch.equal(cache.entry_positions[table].flatten()[: len(index)], index.int())
        assert (table[0] >= 16) == fresh
    if pages is not None:
        assert torch.equal(cache.pool[:16], before[:16]), "pages that others may read were written"
        assert not cache.pool[torch.from_numpy(pages).long()].isnan().any(), "what strangers left was not cleared"
