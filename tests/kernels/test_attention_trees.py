"""Rows with masks, as verifying a tree of drafts brings them: every implementation against the loop over entries."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.attention import paged_attention
from quire.kernels.attention_xformers import expressible
from quire.kernels.backend import Backend
from quire.models.context import AttentionContext

from .oracle import PagedCase, make_case, make_trees, naive_append, naive_attention
from .triton_interpreter import ON_GPU, attention_arguments, attention_triton, to_device, tolerance

SCALE = 0.3
ONES = torch.ones(4, dtype=torch.int64)
BACKENDS: list[Backend] = ["reference", "cpu", "triton"]
OPTIONS: list[dict[str, Any]] = [{}, {"window": 3}, {"softcap": 4.0, "sinks": torch.linspace(-2, 2, 6)}]


@pytest.fixture(params=BACKENDS)
def attend(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Attention by one implementation, of a case whose entries are stored, masks given as `visible`."""

    def call(case: PagedCase, **options: Any) -> Tensor:
        options = {"value_dim": case.value.shape[-1], "max_kept": case.max_kept, "scale": SCALE, **options}
        if request.param != "triton":
            return paged_attention(**attention_arguments(case), **options, backend=request.param)
        device = "cuda" if ON_GPU else "cpu"
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        there = attention_arguments(to_device(case, device))
        return attention_triton.paged_attention_triton(**there, **moved).cpu()

    return call


def check(case: PagedCase, attend: Callable[..., Tensor], visible: Tensor, **options: Any) -> None:
    """Result equals the loop's, and masks matter."""
    naive_append(case)
    result = attend(case, visible=visible, **options)
    expected = naive_attention(case, scale=SCALE, visible=visible, **options)
    torch.testing.assert_close(result.double(), expected, **tolerance(torch.float32))
    plain = naive_attention(case, scale=SCALE, **options)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "softcap and sinks"])
@pytest.mark.parametrize("lengths", [[9, 1, 5], [7, 70, 17]])
def test_random_trees_beside_chains(attend: Callable[..., Tensor], lengths: list[int], options: dict[str, Any]) -> None:
    """Heads of different lengths, pruned ones with gaps too; the second sequence never has masks."""
    case = make_case([[5, 0], [20, 30], [100, 61]], lengths, groups=3, gap=2)
    check(case, attend, make_trees(case, [True, False, True]), **options)


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 254, 300])
def test_trees_across_blocks_of_entries(attend: Callable[..., Tensor], kept: int) -> None:
    case = make_case([[kept, 20]], [64], groups=1, page_size=16)
    check(case, attend, make_trees(case, [True], seed=kept))


@pytest.mark.parametrize("lengths", [[9], [64, 2], [20, 1, 33]])
@pytest.mark.parametrize("window", [None, 6])
def test_a_chains_masks_change_no_bit(
    attend: Callable[..., Tensor], lengths: list[int], window: int | None, request: pytest.FixtureRequest
) -> None:
    """But for sums in another order: Triton begins a chain's windows where they begin, those of a tree at the front."""
    case = make_case([[70, 3]] * len(lengths), lengths, groups=2, gap=2)
    naive_append(case)
    chain = torch.cat([torch.arange(n) for n in lengths]).add(1)
    masks = torch.where(chain == 64, -1, (1 << chain.clamp(max=63)) - 1)
    masked, plain = attend(case, visible=masks, window=window), attend(case, window=window)
    if window and "triton" in request.node.name:
        torch.testing.assert_close(masked, plain, **tolerance(torch.float32))
    else:
        assert torch.equal(masked, plain)


def test_a_branch_is_computed_as_if_it_were_alone(attend: Callable[..., Tensor]) -> None:
    """A row's result is that of its path as a plain chain: what verification rests on."""
    case = make_case([[40, 11]], [8], groups=2)
    parents = [-1, 0, 0, 1, 1, 2, 5, 4]
    paths = [[0]]
    for node, parent in enumerate(parents[1:], 1):
        paths.append([*paths[parent], node])
    start = int(case.positions[0])
    case.positions = torch.tensor([start + len(path) - 1 for path in paths])
    naive_append(case)
    result = attend(case, visible=torch.tensor([sum(1 << node for node in path) for path in paths]))
    for path in paths:
        rows = {name: getattr(case, name)[path] for name in ("query", "key", "value", "positions")}
        chain = replace(case, pool=case.pool.clone(), query_lengths=(len(path),), **rows)
        naive_append(chain)
        torch.testing.assert_close(attend(chain)[-1], result[path[-1]], **tolerance(torch.float32))


def test_bfloat16_tiles_of_the_cpu() -> None:
    """Shapes that take the tile registers where there are any; tolerance as for plain rows in test_cpu_attention."""
    case = make_case([[300, 20], [5, 90]], [9, 33], groups=7, head_dim=64, page_size=16, dtype=torch.bfloat16)
    visible = make_trees(case, [True, True])
    naive_append(case)
    options: dict[str, Any] = {"value_dim": 64, "max_kept": case.max_kept, "scale": 0.1, "visible": visible}
    result = paged_attention(**attention_arguments(case), **options, backend="cpu")
    expected = naive_attention(case, scale=0.1, visible=visible)
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=2**-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_context_hands_masks_down(backend: Backend) -> None:
    case = make_case([[20, 3], [6, 6]], [9, 2])
    visible = make_trees(case, [True, False])
    context = AttentionContext(
        pool=case.pool,
        entry_positions=case.entry_positions,
        page_table=case.page_table[:, None],
        kept=case.kept[:, None],
        query_start=case.query_start,
        query_lengths=case.query_lengths,
        positions=case.positions,
        destinations=None,
        max_kept=case.max_kept,
        visible=visible,
        backend=backend,
    )
    result = context.attend(0, case.query, case.key, case.value, scale=SCALE)
    expected = naive_attention(case, scale=SCALE, visible=visible)
    torch.testing.assert_close(result.double(), expected, **tolerance(torch.float32))


def test_xformers_leaves_trees_to_triton() -> None:
    query, pool = torch.zeros(4, 2, 16, dtype=torch.float16), torch.zeros(2, 2, 8, 16, dtype=torch.float16)
    plain: dict[str, Any] = {"value_dim": 16, "window": None, "softcap": None, "sinks": None}
    assert expressible(query, pool, **plain, visible=None)
    assert not expressible(query, pool, **plain, visible=torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("masks", "error"),
    [(ONES.int(), TypeError), (ONES[:3], ValueError), (ONES.repeat(2)[::2], ValueError)],
)
def test_masks_of_wrong_shape_or_type_are_refused_by_name(
    attend: Callable[..., Tensor], masks: Tensor, error: type[Exception]
) -> None:
    case = make_case([[9, 4]], [4])
    naive_append(case)
    with pytest.raises(error, match="visible must"):
        attend(case, visible=masks)
