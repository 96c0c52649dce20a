"""The loss head's shortcut against autograd over whole rows."""

import pytest
import torch

from quire.distill import picked
from quire.distill.picked import picked_log_probs


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_log_softmax(
    kind: torch.dtype, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picked, "BLOCK", 50 * rows_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 50, generator=generator)).to(kind)
    ids = torch.randint(50, (7, 9), generator=generator)
    ids[:, -1] = ids[:, 0]  # named twice: its gradients add up
    weights = torch.randn(7, 9, generator=generator)

    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    found, expected = picked_log_probs(ours, ids), theirs.log_softmax(1).gather(1, ids)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    assert torch.equal(ours.detach(), logits)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == kind
    # bfloat16 rounds the gradient itself, to 8 bits.
    assert torch.allclose(ours.grad.float(), theirs.grad, rtol=0 if kind == torch.float32 else 2**-8, atol=1e-5)
