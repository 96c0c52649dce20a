"""What comes out of judged draft tokens is the target's distribution, whatever the draft is."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.kernels import distributions
from quire.kernels.distributions import full_logits, truncated_logits
from quire.kernels.noise import stream, uniforms
from quire.kernels.rejection import draw_drafts, judge_drafts
from quire.kernels.sampling import draw_scaled, sample_full, sample_truncated

VOCAB, DRAWS = 12, 20000


def logits_like(seed: int, spread: float = 1.5) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def cut(*, top_k: float = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([int(top_k)]), torch.tensor([top_p]), torch.tensor([min_p])


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    """p-value; draws outside the support fail at once."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    support = expected > 0
    assert not counts[~support].any()
    expected = expected[support].double()
    return float(stats.chisquare(counts[support], expected / expected.sum() * len(tokens)).pvalue)


DRAFTS = {
    "good": logits_like(1) + 0.3 * logits_like(2),
    "bad": -logits_like(1),
    "narrow": torch.where(torch.arange(VOCAB) % 3 == 0, logits_like(3), -torch.inf),
    "a point": torch.where(torch.arange(VOCAB) == 4, 0.0, -torch.inf),
    "the same": logits_like(1),
    "senseless": torch.full((VOCAB,), torch.nan),
}
CUTS = [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("cuts", CUTS)
def test_tokens_follow_the_target(draft: str, cuts: dict[str, float]) -> None:
    """Both sides are cut alike; positions count up, so every draw has noise of its own."""
    temperature, positions, seeds = torch.tensor([0.9]), torch.arange(DRAWS), torch.full((DRAWS,), 77)
    scaled, of_draft = (
        truncated_logits(table[None], temperature, *cut(**cuts)).expand(DRAWS, -1)
        for table in (logits_like(1), DRAFTS[draft])
    )
    drafts = draw_drafts(of_draft, seeds, positions)
    tokens = judge_drafts(scaled, drafts, of_draft, torch.arange(DRAWS), seeds, positions)
    p, q = (table[0].softmax(-1) for table in (scaled, of_draft))
    assert chi_square(tokens, p) > 1e-3
    accepted = (tokens == drafts).double().mean()
    if draft != "senseless":
        # 1 - TVD(p, q), to five standard deviations.
        assert float(accepted) == pytest.approx(float(torch.minimum(p, q).sum()), abs=5 * 0.5 / DRAWS**0.5)
    if draft == "the same":
        assert torch.equal(tokens, drafts)


def test_nothing_is_drawn_behind_a_rejection() -> None:
    """Every draft token is one that the target never says, but for the first of each run."""
    scaled, of_draft = torch.zeros(6, VOCAB), torch.zeros(6, VOCAB)
    scaled[:, 3] = -torch.inf
    drafts = torch.tensor([1, 3, 3, 3, 2, 1])
    heads, seeds = torch.tensor([0, 0, 0, 3, 3, 5]), torch.zeros(6, dtype=torch.int64)
    tokens = judge_drafts(scaled, drafts, of_draft, heads, seeds, torch.arange(6)).tolist()
    assert tokens[0] == 1 and tokens[5] == 1
    assert tokens[1] not in (-1, 3) and tokens[2] == -1
    assert tokens[3] not in (-1, 3)


def test_the_token_does_not_depend_on_what_decides() -> None:
    """Given an accepted draft token or a rejected one, the other streams are as uniform as ever."""
    positions, seeds = torch.arange(DRAWS), torch.full((DRAWS,), 5)
    flat = torch.zeros(DRAWS, VOCAB)
    drawn = [draw_scaled(flat, seeds, stream(positions, number)) for number in range(3)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = torch.bincount(drawn[first] * VOCAB + drawn[second], minlength=VOCAB**2)
        assert stats.chisquare(pairs).pvalue > 1e-3
    high = uniforms(seeds, stream(positions, 2)) > 0.5
    table = torch.stack([torch.bincount(drawn[0][high == side], minlength=VOCAB) for side in (False, True)])
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    numbers = uniforms(seeds, positions)
    assert float(numbers.min()) > 0 and float(numbers.max()) < 1
    assert stats.kstest(numbers.double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("width", [3, 1024])
def test_the_distributions_are_those_that_are_sampled(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the same noise on them gives the same tokens."""
    for module in ("distributions", "sampling"):
        monkeypatch.setattr(f"quire.kernels.{module}.CANDIDATES", width)
    generator = torch.Generator().manual_seed(3)
    rows, vocab = 400, 200
    logits = torch.randn(rows, vocab, generator=generator).mul_(3).round_(decimals=1)  # with ties
    temperature = torch.rand(rows, generator=generator) + 0.3
    min_p = torch.rand(rows, generator=generator) * 0.1
    seeds, positions = torch.arange(rows) * 7919, torch.arange(rows) % 50
    whole = full_logits(logits, temperature, min_p)
    assert torch.equal(draw_scaled(whole, seeds, positions), sample_full(logits, temperature, min_p, seeds, positions))
    top_k = torch.randint(0, 20, (rows,), generator=generator)
    top_p = torch.rand(rows, generator=generator)
    some = truncated_logits(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(
        draw_scaled(some, seeds, positions),
        sample_truncated(logits, temperature, top_k, top_p, min_p, seeds, positions),
    )
    assert width == distributions.CANDIDATES
    limited = top_k > 0
    assert ((some > -torch.inf).sum(1)[limited] <= top_k[limited]).all()
