"""Each policy against its formula, written out head by head and entry by entry."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.core.pruning import Budget, PruneParams, Refinement
from quire.kernels.backend import resolve_backend
from quire.pruning.expected import HORIZON
from quire.pruning.lagkv import PARTITION
from quire.pruning.policy import LayerView, Limits, Policy
from quire.pruning.select import select
from quire.pruning.snapkv import KERNEL
from quire.pruning.table import POLICIES, make_policy

from .views import make_view, with_states

LIMITS = Limits(sinks=2, window=6, target=12)
GROUP = 3
DIM = 8


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Three of four pairs turn."""
    angles = positions.float()[:, None] * torch.tensor([1.0, 0.3, 0.01])
    return angles.cos(), angles.sin()


def observed_view(
    lengths: list[int], *, num_tokens: int, seed: int = 0, softcap: float | None = None, sinks: bool = False
) -> LayerView:
    """A view with everything that any policy may ask for."""
    view = make_view(lengths, num_tokens=num_tokens, dim=DIM, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    heads, window = GROUP * len(lengths), min(LIMITS.window, num_tokens)
    factors = torch.randn(heads, DIM, DIM, generator=generator)
    return replace(
        view,
        backend=resolve_backend(view.lengths.device, torch.float32),
        queries=torch.randn(window, heads, DIM, generator=generator) * 3,
        query_positions=torch.arange(num_tokens - window, num_tokens),
        seen=torch.randint(1, 9, view.valid.shape, generator=generator).float(),
        query_mean=torch.randn(heads, DIM, generator=generator),
        query_covariance=factors @ factors.transpose(1, 2) / DIM,
        rotation=rotation,
        output_weight=torch.randn(20, heads * DIM, generator=generator),
        softcap=softcap,
        sink_logits=torch.randn(heads, generator=generator) if sinks else None,
        mass=torch.rand(view.valid.shape, generator=generator),
        repeated=torch.rand(view.valid.shape, generator=generator),
    )


def entries_of(view: LayerView, head: int) -> range:
    return range(int(view.lengths[head]))


def attention(view: LayerView, head: int, row: int, query_head: int) -> list[float]:
    """One row's probabilities over a kv head's entries."""
    assert view.queries is not None and view.query_positions is not None
    logits = []
    for e in entries_of(view, head):
        logit = float(view.queries[row, query_head] @ view.keys[head, e]) * view.scale
        logit = view.softcap * math.tanh(logit / view.softcap) if view.softcap else logit
        logits.append(logit if view.positions[head, e] <= view.query_positions[row] else -math.inf)
    sink = 0.0 if view.sink_logits is None else math.exp(float(view.sink_logits[query_head]))
    exps = [math.exp(x) for x in logits]
    return [x / (sum(exps) + sink) for x in exps]


def window_literal(view: LayerView, head: int) -> list[float]:
    return [float(view.positions[head, e]) for e in entries_of(view, head)]


def knorm_literal(view: LayerView, head: int) -> list[float]:
    return [-math.sqrt(sum(float(x) ** 2 for x in view.keys[head, e])) for e in entries_of(view, head)]


def keydiff_literal(view: LayerView, head: int) -> list[float]:
    units = [view.keys[head, e] / view.keys[head, e].norm() for e in entries_of(view, head)]
    anchor = sum(units[1:], units[0]) / len(units)
    return [-float(unit @ anchor / anchor.norm()) for unit in units]


def snapkv_literal(view: LayerView, head: int) -> list[float]:
    length, cut = int(view.lengths[head]), view.num_tokens - LIMITS.window
    rows = [attention(view, head, w, head * GROUP + g) for w in range(LIMITS.window) for g in range(GROUP)]
    mean = [sum(row[e] for row in rows) / len(rows) if view.positions[head, e] < cut else 0.0 for e in range(length)]
    around = [range(e - KERNEL // 2, e + KERNEL // 2 + 1) for e in range(length)]
    return [sum(mean[i] for i in near if 0 <= i < length) / KERNEL for near in around]


def tova_literal(view: LayerView, head: int) -> list[float]:
    by_token: dict[int, list[float]] = {}
    for k in range(len(view.lengths)):
        for g in range(GROUP):
            for e, p in enumerate(attention(view, k, -1, k * GROUP + g)):
                by_token.setdefault(int(view.positions[k, e]), []).append(p)
    shares = {token: sum(ps) / len(ps) for token, ps in by_token.items()}
    return [shares[int(view.positions[head, e])] for e in entries_of(view, head)]


def h2o_literal(view: LayerView, head: int) -> list[float]:
    assert view.mass is not None and view.seen is not None
    return [float(view.mass[head, e]) / float(view.seen[head, e]) for e in entries_of(view, head)]


def kvzip_literal(view: LayerView, head: int) -> list[float]:
    assert view.repeated is not None
    return view.repeated[head, : len(entries_of(view, head))].tolist()


def expected_literal(view: LayerView, head: int) -> list[float]:
    """E[exp(q.k s)] by the formula, queries turned to each coming position and the turns averaged."""
    assert view.query_mean is not None and view.query_covariance is not None
    cos, sin = rotation(torch.arange(view.num_tokens, view.num_tokens + HORIZON))
    turn = torch.zeros(DIM, DIM)
    for c, s in zip(cos, sin, strict=True):
        for i in range(3):
            turn[i, i] += c[i] / HORIZON
            turn[i + 3, i + 3] += c[i] / HORIZON
            turn[i, i + 3] -= s[i] / HORIZON
            turn[i + 3, i] += s[i] / HORIZON
    turn[6, 6] = turn[7, 7] = 1
    totals = [0.0 for _ in entries_of(view, head)]
    counted = [e for e in entries_of(view, head) if view.positions[head, e] >= LIMITS.sinks]
    for g in range(GROUP):
        mean = turn @ view.query_mean[head * GROUP + g]
        spread = turn @ view.query_covariance[head * GROUP + g] @ turn.T
        logits = {}
        for e in counted:
            key = view.keys[head, e]
            logits[e] = float(mean @ key * view.scale + key @ spread @ key * view.scale**2 / 2)
        total = sum(math.exp(x) for x in logits.values())
        for e in counted:
            totals[e] += math.exp(logits[e]) / total / GROUP
    return [share * float(view.values[head, e].norm()) for e, share in enumerate(totals)]


LITERAL: dict[str, Callable[[LayerView, int], list[float]]] = {
    "window": window_literal,
    "knorm": knorm_literal,
    "keydiff": keydiff_literal,
    "snapkv": snapkv_literal,
    "tova": tova_literal,
    "h2o": h2o_literal,
    "kvzip": kvzip_literal,
    "expected": expected_literal,
}


def fresh(name: str) -> Policy:
    return make_policy(PruneParams(policy=name))


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True)])
def test_formula(name: str, softcap: float | None, sinks: bool) -> None:
    view = observed_view([30, 21], num_tokens=40, softcap=softcap, sinks=sinks)
    scores = fresh(name).scores(view, LIMITS)
    assert scores.shape == view.valid.shape
    for head in range(2):
        expected = torch.tensor(LITERAL[name](view, head))
        torch.testing.assert_close(scores[head, : len(expected)].float(), expected, rtol=2e-4, atol=1e-6)


def lagkv_literal(view: LayerView, head: int) -> list[float | None]:
    """Rank within the partition over its size; None where the entry is newer than what can be ranked."""
    length, sinks = int(view.lengths[head]), LIMITS.sinks
    starts = list(range(sinks, length - PARTITION + 1, PARTITION))
    result: list[float | None] = [None] * length
    for start, following in itertools.pairwise(starts):
        spreads = [torch.zeros(PARTITION), torch.zeros(PARTITION)]
        for spread, states in zip(spreads, (view.keys[head], view.values[head]), strict=True):
            ahead = states[following : following + PARTITION]
            low, high = ahead.amin(0), ahead.amax(0)
            for i in range(PARTITION):
                spread[i] = ((states[start + i] - low) / (high - low)).std()
        both = spreads[0].softmax(0) + spreads[1].softmax(0)
        for rank, i in enumerate(both.argsort().tolist()):
            result[start + i] = rank / PARTITION
    return result


def test_lagkv_formula() -> None:
    view = make_view([5 * PARTITION + 3, 3 * PARTITION + 90, PARTITION + 5], num_tokens=900)
    scores = fresh("lagkv").scores(view, LIMITS)
    for head in range(3):
        expected = lagkv_literal(view, head)
        for e, rank in enumerate(expected):
            assert scores[head, e] >= 1 if rank is None else scores[head, e] == pytest.approx(rank, abs=1e-6)
        unranked = scores[head, : len(expected)][[rank is None for rank in expected]]
        assert (unranked.diff() > 0).all(), "the newer, the better"


def test_lagkv_before_a_run_of_one_token() -> None:
    """The next partition's values have no range: what differs from them stands out, and nothing is NaN."""
    view = make_view([4 * PARTITION], num_tokens=4 * PARTITION)
    keys, values = torch.full_like(view.keys, 1.0), torch.full_like(view.values, 2.0)
    keys[0, 50], values[0, 50] = torch.randn(2, 8)
    view = with_states(view, keys, values)
    scores = fresh("lagkv").scores(view, LIMITS)
    assert int(scores[0, LIMITS.sinks : LIMITS.sinks + PARTITION].argmax()) == 50 - LIMITS.sinks


@pytest.mark.parametrize("name", POLICIES)
def test_padding_is_never_read(name: str) -> None:
    """Views are full of NaN past each head's length; more padding changes nothing either."""
    view = observed_view([30, 21, 8], num_tokens=40)
    scores = fresh(name).scores(view, LIMITS)
    assert not scores[view.valid].isnan().any()
    cut = 30
    by_entry = ("positions", "mass", "seen", "repeated")
    tight = with_states(
        view, view.keys[:, :cut], view.values[:, :cut], **{name: getattr(view, name)[:, :cut] for name in by_entry}
    )
    if name != "lagkv":  # whose unranked entries count from the end of the view; their order is the same
        torch.testing.assert_close(fresh(name).scores(tight, LIMITS)[tight.valid], scores[view.valid])


@pytest.mark.parametrize("name", POLICIES)
def test_heads_may_come_in_any_order(name: str) -> None:
    view = observed_view([30, 21, 8], num_tokens=40)
    order = torch.tensor([2, 0, 1])
    rows = (order[:, None] * GROUP + torch.arange(GROUP)).flatten()
    assert view.queries is not None and view.query_mean is not None and view.query_covariance is not None
    by_head = ("positions", "lengths", "mass", "seen", "repeated")
    shuffled = with_states(
        view,
        view.keys[order],
        view.values[order],
        **{field: getattr(view, field)[order] for field in by_head},
        queries=view.queries[:, rows],
        query_mean=view.query_mean[rows],
        query_covariance=view.query_covariance[rows],
    )
    scores = fresh(name).scores(view, LIMITS)[order]
    torch.testing.assert_close(fresh(name).scores(shuffled, LIMITS)[shuffled.valid], scores[shuffled.valid])


@pytest.mark.parametrize("name", ["tova", "snapkv", "h2o", "expected", "kvzip"])
def test_a_missing_observation_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="in its needs"):
        fresh(name).scores(make_view([9], num_tokens=9), LIMITS)


@pytest.mark.parametrize("name", POLICIES)
def test_bfloat16_cache(name: str) -> None:
    """Scores are float32 and close to those of the same numbers in float32."""
    view = observed_view([30, 21], num_tokens=40)
    assert view.queries is not None
    keys, values, queries = view.keys.bfloat16(), view.values.bfloat16(), view.queries.bfloat16()
    half = with_states(view, keys, values, queries=queries)
    same = with_states(view, keys.float(), values.float(), queries=queries.float())
    scores = fresh(name).scores(half, LIMITS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[view.valid], fresh(name).scores(same, LIMITS)[view.valid], rtol=1e-3, atol=1e-5)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(POLICIES)),
    budget=st.sampled_from(["uniform", "pyramid", "prefix", "ada", "global"]),
    refine=st.sampled_from([(), ("value-norm",), ("chunk",), ("value-norm", "chunk")]),
    lengths=st.lists(st.integers(8, 60), min_size=2, max_size=2),
    target=st.integers(8, 60),
    seed=st.integers(0, 50),
)
def test_any_combination_keeps_what_is_protected(
    name: str, budget: Budget, refine: tuple[Refinement, ...], lengths: list[int], target: int, seed: int
) -> None:
    params = PruneParams(policy=name, budget=budget, refine=refine, sinks=2, window=6)
    views = [replace(observed_view(lengths, num_tokens=64, seed=seed + i), layer=i) for i in range(2)]
    selection = select(make_policy(params), views, params, target)
    assert selection.counts.sum() <= target * 4
    for view, keep, counts in zip(views, selection.keep, selection.counts, strict=True):
        for head, count in enumerate(counts.tolist()):
            kept = keep[head, :count].tolist()
            assert kept == sorted(set(kept)) and (not kept or kept[-1] < lengths[head])
            positions = view.positions[head, : lengths[head]].tolist()
            assert {i for i, p in enumerate(positions) if p < 2 or p >= 58} <= set(kept)
