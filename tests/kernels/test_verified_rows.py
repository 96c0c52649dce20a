"""Verifying drafts on the CPU gives, to the bit, what decoding the tokens one by one gives: greedy text rests on it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from quire.core.config import embedded_model
from quire.kernels.attention_cpu import PagedStep
from quire.models.context import AttentionContext
from quire.models.loading import load_runner
from quire.models.placement import Placement
from quire.models.runner import ModelRunner

from .oracle import PagedCase, make_case

DTYPES = [torch.float32, torch.bfloat16]
ROWS = ("query", "key", "value", "positions")
PAGE, PROMPT, STEPS = 16, 290, 9


def attend(case: PagedCase, first: int, count: int) -> Tensor:
    """Of rows first .. first + count - 1 of every sequence, which all bring nine; earlier ones are in the cache."""
    sequences = len(case.kept)
    chosen = torch.arange(STEPS * sequences).view(sequences, STEPS)[:, first : first + count]
    query, key, value, positions = (getattr(case, name)[chosen].flatten(0, 1) for name in ROWS)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * count
    tables = (case.page_table[:, None], case.kept[:, None] + first)
    step = PagedStep(case.pool, case.entry_positions, *tables, starts, positions)
    return step.append_and_attend(0, query, key, value, scale=0.2).unflatten(0, (sequences, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 4, 7, 8, 20])
@pytest.mark.parametrize("sequences", [1, 5])
def test_attention_of_several_rows_is_that_of_each(dtype: torch.dtype, groups: int, sequences: int) -> None:
    """Over a cache of several parts, by few sequences and by so many that heads are read whole."""
    kept = [[700, 20], [250, 255], [0, 510], [5, 5], [300, 1000]][:sequences]
    case = make_case(kept, [STEPS] * sequences, groups=groups, head_dim=64, page_size=PAGE, dtype=dtype)
    one_by_one = torch.cat([attend(case, row, 1) for row in range(STEPS)], 1)
    for count in range(2, STEPS + 1):
        fresh = dataclasses.replace(case, pool=torch.where(case.pool.isnan(), 0, case.pool))
        assert torch.equal(attend(fresh, 0, count), one_by_one[:, :count])


class Cache:
    """Pages of a sequence of quire-mini."""

    def __init__(self, runner: ModelRunner, dtype: torch.dtype) -> None:
        spec, pages = runner.spec, -(-(PROMPT + STEPS) // PAGE)
        shape = (1, spec.num_layers, spec.num_kv_heads, pages)
        total = torch.Size(shape).numel()
        self.runner = runner
        self.table = torch.arange(total, dtype=torch.int32).view(shape)
        self.pool = torch.zeros(total, 2, PAGE, spec.head_dim, dtype=dtype)
        self.entry_positions = torch.zeros(total, PAGE, dtype=torch.int32)

    def logits(self, ids: Tensor, start: int) -> Tensor:
        """[n, V] of tokens [n] from position `start` on, whose entries are kept."""
        count = len(ids)
        positions = torch.arange(start, start + count)
        context = AttentionContext(
            pool=self.pool,
            entry_positions=self.entry_positions,
            page_table=self.table,
            kept=torch.full(self.table.shape[:3], start, dtype=torch.int32),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            query_lengths=(count,),
            positions=positions,
            destinations=None,
            max_kept=start + count,
            backend="cpu",
        )
        return self.runner.forward(ids, positions, torch.full_like(positions, 512), context, torch.arange(count))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_models_logits_of_several_rows_are_those_of_each(dtype: torch.dtype) -> None:
    place = Placement(torch.device("cpu"), dtype, "cpu")
    runner = load_runner(
        str(embedded_model()), place=place, runner="native", trust_remote_code=False, on_progress=lambda *_: None
    )
    cache, ids = Cache(runner, dtype), torch.arange(PROMPT + STEPS) * 31 % 5000
    cache.logits(ids[:PROMPT], 0)
    one_by_one = torch.cat([cache.logits(ids[at : at + 1], at) for at in range(PROMPT, PROMPT + STEPS)])
    for count in range(2, STEPS + 1):
        assert torch.equal(cache.logits(ids[PROMPT : PROMPT + count], PROMPT), one_by_one[:count])
