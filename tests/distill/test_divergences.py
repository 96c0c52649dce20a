"""Formulas against dense ones written out, with and without lumped tokens."""

import pytest
import torch
from torch import Tensor

from quire.distill.divergences import DIVERGENCES, FORMULAS, Divergence, acceptance, lump

ROWS, VOCAB = 7, 40


def dense(name: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The textbook's formula over probabilities [N, events] in float64."""
    mean = (p + q) / 2
    overlap = torch.minimum(p, q).sum(1)
    return {
        "kl": (p * (p / q).log()).sum(1),
        "rkl": (q * (q / p).log()).sum(1),
        "jsd": 0.5 * (p * (p / mean).log()).sum(1) + 0.5 * (q * (q / mean).log()).sum(1),
        "tvd": 1 - overlap,
        "logacc": -overlap.log(),
    }[name]


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn(ROWS, VOCAB, generator=generator),
        3 * torch.randn(ROWS, VOCAB, generator=generator),
    )


def lumped(logits: Tensor, ids: Tensor) -> Tensor:
    """Probabilities [N, K + 1] in float64, summed the long way."""
    p = logits.double().softmax(1)
    kept = p.gather(1, ids)
    return torch.cat([kept, p.scatter(1, ids, 0.0).sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kept", [1, 5, VOCAB - 1])
def test_lumped_rows_give_the_dense_formula_of_their_events(
    name: Divergence, kept: int, logits: tuple[Tensor, Tensor]
) -> None:
    ids = logits[0].topk(kept).indices
    p_log, q_log = (lump(side, ids) for side in logits)
    p, q = (lumped(side, ids) for side in logits)
    assert torch.allclose(p_log.exp().double(), p, atol=1e-6)
    expected = dense(name, p, q)
    # float32: a small mass of all others is 1 minus what is close to 1
    assert torch.allclose(FORMULAS[name](p_log, q_log).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_every_token_kept_it_is_the_divergence_of_the_whole_rows(
    name: Divergence, logits: tuple[Tensor, Tensor]
) -> None:
    ids = logits[0].argsort(1, descending=True)
    p, q = (side.double().softmax(1) for side in logits)
    found = FORMULAS[name](*(lump(side, ids) for side in logits))
    assert torch.allclose(found.double(), dense(name, p, q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_descending_it_raises_acceptance_and_the_target_is_its_minimum(
    name: Divergence, logits: tuple[Tensor, Tensor]
) -> None:
    target, start = logits
    ids = target.topk(8).indices
    p_log = lump(target, ids)
    assert FORMULAS[name](p_log, p_log).abs().max() < 1e-5
    draft = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([draft], lr=0.1)
    first = acceptance(p_log, lump(draft, ids)).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        FORMULAS[name](p_log, lump(draft, ids)).sum().backward()
        assert draft.grad is not None and draft.grad.isfinite().all()
        optimizer.step()
    assert acceptance(p_log, lump(draft, ids)).mean().item() > first + 0.2


def test_lumping_bounds_acceptance_from_above(logits: tuple[Tensor, Tensor]) -> None:
    p, q = (side.softmax(1) for side in logits)
    whole = torch.minimum(p, q).sum(1)
    for kept in (1, 4, 16):
        ids = logits[0].topk(kept).indices
        assert (acceptance(*(lump(side, ids) for side in logits)) >= whole - 1e-6).all()
