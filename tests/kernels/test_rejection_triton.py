"""Judged draft tokens by the kernels against `kernels.rejection.judge_drafts`: the same tokens."""

import pytest
import torch

from quire.kernels.rejection import draw_drafts, judge_drafts

from .triton_interpreter import DEVICES, rejection_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)


def test_tokens_are_the_references(device: str) -> None:
    """Runs of one to four rows over several chunks: drafts that are good, bad, cut, senseless, and the target's own."""
    generator = torch.Generator().manual_seed(3)
    rows, vocabulary = 40, 3000
    scaled = torch.randn(rows, vocabulary, generator=generator) * 2
    of_draft = scaled + torch.randn(rows, vocabulary, generator=generator) * torch.linspace(0, 2, rows)[:, None]
    scaled[5:9, ::2] = float("-inf")
    of_draft[10, 7:] = float("-inf")
    scaled, of_draft = (x - x.amax(-1, keepdim=True) for x in (scaled, of_draft))
    of_draft[11] = float("nan")
    heads = torch.tensor([row - row % 4 if row < 20 else row for row in range(rows)])
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    accepted = 0
    for start in (0, 1000):
        positions = torch.arange(rows) + start
        drafts = draw_drafts(of_draft, seeds, positions)
        expected = judge_drafts(scaled, drafts, of_draft, heads, seeds, positions)
        arguments = (x.to(device) for x in (scaled, drafts, of_draft, heads, seeds, positions))
        assert rejection_triton.judge_drafts_triton(*arguments).tolist() == expected.tolist()
        accepted += int((expected == drafts).sum())
        assert (expected == -1).any()
    assert 20 < accepted < 70


def test_refuses_distributions_of_another_shape(device: str) -> None:
    logits, numbers = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="draft_processed must have shape"):
        rejection_triton.judge_drafts_triton(logits, numbers, logits[:, :7], numbers, numbers, numbers)
