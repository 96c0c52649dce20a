"""A slot that begins with pages computed by another: read by both, changed by neither."""

import numpy as np
import torch

from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, PageGrants, SequencePlan, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.cache import KVCache
from quire.engine.sizing import CacheLayout

from .fake_model import FakeRunner
from .harness import Harness, make_engine

GREEDY = SamplingParams(temperature=0.0)


def test_shared_pages_keep_their_contents_and_fill_the_table() -> None:
    layout = CacheLayout(2, 2, 8, page_size=4, num_slots=3, max_model_len=40, dtype=torch.float32)
    cache = KVCache(layout, 20, torch.device("cpu"))
    cache.pool.normal_()
    before = cache.pool.clone()
    rows, columns = np.indices((4, 2), np.int32).reshape(2, -1)
    shares = PageGrants(np.full(8, 1, np.int32), rows, columns, np.arange(8, 16, dtype=np.int32))
    grants = PageGrants(*(np.array([number], np.int32) for number in (1, 3, 2, 19)))
    assignments = (
        SlotAssignment(SlotId(1), GREEDY, 0, (), (1,) * 9, (), 20, cached=8),
        SlotAssignment(SlotId(2), GREEDY, 0, (), (1,), (), 20),
    )
    cache.apply(BatchPlan((), assignments, grants=grants, shares=shares))
    assert cache.kept.view(3, 4).tolist() == [[0] * 4, [8] * 4, [0] * 4]
    assert cache.longest(np.array([1, 2], np.int32), [1, 1]) == 9
    table = cache.page_table[1].view(4, -1)
    assert table[:, :2].tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]] and table[3, 2] == 19
    assert torch.equal(cache.pool[:19], before[:19]) and cache.pool[19].eq(0).all()


def test_a_sequence_goes_on_from_shared_pages_as_from_its_own() -> None:
    engine = make_engine(FakeRunner())
    harness = Harness(engine)
    first = harness.add(0, [5, 6, 3, 8, 9, 10, 11, 12, 14])
    expected = harness.generate(first, 5)
    rows, columns = np.indices((harness.rows, 2), np.int32).reshape(2, -1)
    pages = np.array([first.pages[row][:2] for row in range(harness.rows)], np.int32)
    shares = PageGrants(np.full(rows.size, 3, np.int32), rows, columns, pages.ravel())
    contents = engine.cache.pool[pages.ravel()].clone()
    fresh = np.array([harness.free.pop() for _ in range(harness.rows)], np.int32)
    every = np.arange(harness.rows, dtype=np.int32)
    grants = PageGrants(np.full_like(every, 3), every, np.full_like(every, 2), fresh)
    assignment = SlotAssignment(SlotId(3), GREEDY, 0, (), tuple(first.prompt), (), 100, cached=8)
    part = SequencePlan(SlotId(3), 8, (14,), sample=True)
    (output,) = engine.step(BatchPlan((part,), (assignment,), grants=grants, shares=shares)).sequences
    tokens = list(output.token_ids)
    while len(tokens) < 4:  # four fit the last page
        part = SequencePlan(SlotId(3), 8 + len(tokens), (tokens[-1],), sample=True)
        tokens += engine.step(BatchPlan((part,))).sequences[0].token_ids
    assert tokens == expected[:4]
    assert torch.equal(engine.cache.pool[pages.ravel()], contents)
