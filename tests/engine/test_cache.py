"""Page tables against a plain model of lists, and the size of the pool."""

import random

import numpy as np
import pytest
import torch

from quire.core.config import EngineConfig, embedded_model
from quire.core.errors import ConfigError
from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, PageDrop, PageGrants, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine import device, sizing
from quire.engine.cache import KVCache
from quire.engine.device import choose_placement
from quire.engine.engine import Engine
from quire.engine.sizing import CacheLayout

from .fake_model import FakeRunner
from .harness import make_engine

LAYOUT = CacheLayout(2, 2, 8, page_size=4, num_slots=3, max_model_len=40, dtype=torch.float32)
CPU = torch.device("cpu")


def grant(cache: KVCache, slot: int, row: int, column: int, page: int) -> None:
    parts = (np.array([n], np.int32) for n in (slot, row, column, page))
    cache.apply(BatchPlan((), grants=PageGrants(*parts)))


def grow(cache: KVCache, slot: int, tables: list[list[int]], kept: list[int]) -> None:
    """One more full page for each head of the slot."""
    for row, pages in enumerate(tables):
        pages.append(random.randrange(cache.num_pages))
        grant(cache, slot, row, len(pages) - 1, pages[-1])
        kept[row] += 4
    cache.advance(torch.tensor([slot]), torch.tensor([4], dtype=torch.int32), np.array([slot], np.int32), [4])


def test_tables_follow_grants_drops_and_assignments() -> None:
    random.seed(3)
    cache = KVCache(LAYOUT, 50, CPU)
    tables: list[list[list[int]]] = [[[] for _ in range(4)] for _ in range(3)]
    kept = [[0] * 4 for _ in range(3)]
    for _ in range(200):
        slot = random.randrange(3)
        if min(map(len, tables[slot])) > 3 and random.random() < 0.6:
            rows = sorted(random.sample(range(4), 2))
            cache.apply(BatchPlan((), drops=(PageDrop(SlotId(slot), np.array(rows, np.int32), 2),)))
            for row in rows:
                del tables[slot][row][:2]
                kept[slot][row] -= 8
        elif max(map(len, tables[slot])) > 9:
            assignment = SlotAssignment(SlotId(slot), SamplingParams(), 0, (), (1,), (), 10)
            cache.apply(BatchPlan((), (assignment,)))
            tables[slot], kept[slot] = [[] for _ in range(4)], [0] * 4
        else:
            grow(cache, slot, tables[slot], kept[slot])
        assert cache.kept.view(3, 4).tolist() == kept
        for i in range(3):
            assert cache.longest(np.array([i], np.int32), [5]) == max(kept[i]) + 5
            for row in range(4):
                seen = cache.page_table.view(3, 4, -1)[i, row, : len(tables[i][row])]
                assert seen.tolist() == tables[i][row]


def test_granted_pages_are_cleared_others_are_not() -> None:
    cache = KVCache(LAYOUT, 5, CPU)
    cache.pool.fill_(float("nan"))
    grant(cache, 0, 1, 0, 3)
    assert cache.pool[3].eq(0).all() and cache.pool[[0, 1, 2, 4]].isnan().all()


def test_pool_size_is_what_the_settings_say() -> None:
    runner = FakeRunner((None, 6))
    info = make_engine(runner, max_model_len=100, kv_memory=100_000).info
    page = 4 * (2 * 8 * 4 + 4)
    assert info.num_pages == 100_000 // page and info.kv_bytes == info.num_pages * page
    # Per kv head 25 pages in the full layer; window 6 and a chunk of 64 take 18 and one more in the other.
    assert info.max_concurrency == info.num_pages / (2 * (25 + 19))
    default = make_engine(runner, max_model_len=100).info
    assert default.num_pages == 6 * 2 * (25 + 19) and default.max_concurrency == 6.0
    assert make_engine(runner).info.max_model_len == runner.spec.max_context


def test_too_little_or_too_much_memory_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"needs at least 2\.125 KiB .* but gets 1000 bytes") as raised:
        make_engine(FakeRunner(), kv_memory=1000)
    assert raised.value.param == "kv_memory" and "\n" not in raised.value.message
    with pytest.raises(ConfigError, match=r"kv_memory is 1024 TiB, but only .*B are free|of memory are free on cpu"):
        make_engine(FakeRunner(), kv_memory=2**50)
    make_engine(FakeRunner(), kv_memory=8 * 4 * (2 * 8 * 4 + 4)).warm_up()  # two pages for each of four heads


def test_default_is_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_memory", lambda device: 200_000)
    engine = make_engine(FakeRunner())
    assert engine.info.kv_bytes + engine.cache.layout.table_bytes <= 50_000
    assert engine.info.max_concurrency < 6
    monkeypatch.setattr(sizing, "free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="page tables"):
        make_engine(FakeRunner())


def test_longer_than_trained_is_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert make_engine(FakeRunner(), max_model_len=500).info.max_model_len == 500
    assert "trained for 128 positions" in caplog.text


def test_types_follow_the_checkpoint_and_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(embedded_model()), device="cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "_cpu_computes_bfloat16", lambda native=native: native)
        assert choose_placement(config).dtype == expected
    chosen = choose_placement(EngineConfig(model="unread", device="cpu", dtype="float16"))
    assert (chosen.dtype, chosen.dtype_name) == (torch.float16, "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_placement(EngineConfig(model="unread", device="cuda"))


def test_loading_reports_progress_and_gives_a_ready_engine() -> None:
    phases: list[tuple[str, int, int]] = []
    config = EngineConfig(model=str(embedded_model()), device="cpu", dtype="float32", max_num_seqs=2, kv_memory=10**7)
    engine = Engine.load(config, lambda *progress: phases.append(progress))
    assert phases[0][0] == "loading weights" and phases[-2:] == [("warming up", 0, 1), ("warming up", 1, 1)]
    assert (engine.info.runner, engine.info.dtype, engine.info.model) == ("native", "float32", engine.spec)
    assert engine.info.kv_bytes <= 10**7 and not engine.cache.kept.any()
