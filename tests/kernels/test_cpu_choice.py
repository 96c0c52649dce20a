"""The C++ kernels that cut, draw and judge against their references: the same noise must give the same tokens.

Sums of masses may differ in the last bits, and so may logarithms; with these seeds no draw is that close.
"""

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu_library import cpu_library
from quire.kernels.distributions import full_logits, truncated_logits
from quire.kernels.rejection import draw_drafts, judge_drafts
from quire.kernels.sampling import draw_scaled, sample_full, sample_truncated

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="no compiler")
ROWS = 120
Cuts = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_like(vocab: int, spread: float, seed: int = 0) -> tuple[Tensor, Cuts]:
    """Logits with ties, and temperature, top-k, top-p and min-p of each row: any of them may be off, not both cuts."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float) -> Tensor:
        return torch.rand(ROWS, generator=generator) < share

    logits = torch.randn(ROWS, vocab, generator=generator).mul_(spread).round_(decimals=1)
    temperature = torch.rand(ROWS, generator=generator) * 1.5 + 0.05
    top_k = torch.randint(1, 3 * vocab // 2 + 1, (ROWS,), generator=generator) * chance(0.5)
    top_p = torch.where(chance(0.8), torch.rand(ROWS, generator=generator).clamp(min=1e-6), 1.0)
    top_k = torch.where((top_k < 1) & (top_p >= 1), 7, top_k)
    min_p = torch.rand(ROWS, generator=generator) * 0.1 * chance(0.5)
    return logits, (temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("vocab", [1, 5, 200, 8195])
def test_the_same_tokens_are_kept_and_drawn(vocab, spread):
    logits, cuts = rows_like(vocab, spread)
    temperature, _, _, min_p = cuts
    kept, expected = truncated_logits(logits, *cuts, "cpu"), truncated_logits(logits, *cuts)
    assert torch.equal(kept, expected)
    assert torch.equal(full_logits(logits, temperature, min_p, "cpu"), full_logits(logits, temperature, min_p))
    keys = torch.arange(ROWS) * 7919 - 400, torch.arange(ROWS) * 3
    assert torch.equal(sample_truncated(logits, *cuts, *keys, "cpu"), sample_truncated(logits, *cuts, *keys))
    whole = logits, temperature, min_p, *keys
    assert torch.equal(sample_full(*whole, "cpu"), sample_full(*whole))
    assert torch.equal(draw_drafts(kept, *keys, "cpu"), draw_drafts(kept, *keys))


def test_rows_apart_in_memory_and_forbidden_tokens():
    logits, cuts = rows_like(300, 3.0)
    logits[:, ::3] = -torch.inf
    wide = torch.full((ROWS, 400), 99.0)
    wide[:, :300] = logits
    assert torch.equal(truncated_logits(wide[:, :300], *cuts, "cpu"), truncated_logits(logits, *cuts))
    strengths = torch.stack((cuts[0], *cuts[2:]), 1)  # columns, as the sampler hands them
    temperature, top_p, min_p = strengths.unbind(1)
    assert torch.equal(
        truncated_logits(logits, temperature, cuts[1], top_p, min_p, "cpu"), truncated_logits(logits, *cuts)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_distribution_leaves_the_others_alone(bad):
    logits, cuts = rows_like(100, 3.0)
    expected = truncated_logits(logits, *cuts)
    spoilt = logits.clone()
    spoilt[5] = bad
    kept = truncated_logits(spoilt, *cuts, "cpu")
    others = torch.arange(ROWS) != 5
    assert torch.equal(kept[others], expected[others])
    drawn = draw_scaled(kept, torch.arange(ROWS), torch.arange(ROWS), "cpu")
    assert ((drawn >= 0) & (drawn < 100)).all()


@pytest.mark.parametrize("cut", [True, False])
def test_the_same_drafts_are_accepted_and_replaced(cut):
    logits, cuts = rows_like(500, 2.0)
    noisy = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    scaled, drafted = (
        truncated_logits(part, *cuts) if cut else full_logits(part, cuts[0], cuts[3]) for part in (logits, noisy)
    )
    drafted[7] = torch.nan
    heads = torch.arange(ROWS) // 4 * 4
    seeds, positions = torch.arange(ROWS) * 31, torch.arange(ROWS)
    drafts = draw_drafts(drafted, seeds, positions)
    arguments = scaled, drafts, drafted, heads, seeds, positions
    tokens = judge_drafts(*arguments, "cpu")
    expected = judge_drafts(*arguments)
    reached = [row for row in range(ROWS) if torch.equal(expected[heads[row] : row], drafts[heads[row] : row])]
    assert torch.equal(tokens[reached], expected[reached])
    assert 5 < int((tokens[reached] == drafts[reached]).sum()) < len(reached) - 5 < ROWS - 10
    assert torch.equal(judge_drafts(drafted, drafts, drafted, heads, seeds, positions, "cpu")[8:], drafts[8:])


def test_nothing_is_drawn_behind_a_rejection():
    """Every draft token is one that the target never says, but for the first of each run."""
    scaled, drafted = torch.zeros(6, 12), torch.zeros(6, 12)
    scaled[:, 3] = -torch.inf
    drafts, heads = torch.tensor([1, 3, 3, 3, 2, 1]), torch.tensor([0, 0, 0, 3, 3, 5])
    tokens = judge_drafts(scaled, drafts, drafted, heads, torch.zeros(6, dtype=torch.int64), torch.arange(6), "cpu")
    assert tokens[[0, 2, 4, 5]].tolist() == [1, -1, -1, 1]
    assert not {-1, 3} & set(tokens[[1, 3]].tolist())
