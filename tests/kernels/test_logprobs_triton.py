"""Log-probabilities by the kernel against `kernels.sampling.token_logprobs`."""

import pytest
import torch

from quire.kernels.sampling import token_logprobs

from .triton_interpreter import DEVICES, logprobs_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize(("vocabulary", "top"), [(1, 5), (40, 0), (40, 128), (5000, 5), (4097, 1)])
def test_tokens_and_values_are_the_references(device: str, vocabulary: int, top: int) -> None:
    """Among many equal logits, and some forbidden, the lowest ids come first."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(3, vocabulary + 2, generator=generator)[:, 1 : vocabulary + 1]
    logits[1] = logits[1].round()
    logits[2, 1:] = float("-inf")
    tokens = torch.tensor([vocabulary - 1, vocabulary // 2, 0])
    expected = token_logprobs(logits, tokens, top)
    result = logprobs_triton.token_logprobs_triton(logits.to(device), tokens.to(device), top)
    assert torch.equal(result[1].cpu(), expected[1])
    for values, others in ((result[0], expected[0]), (result[2], expected[2])):
        torch.testing.assert_close(values.cpu(), others, rtol=1e-6, atol=2e-6)


def test_refusals(device: str) -> None:
    logits, tokens = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="top must be between 0 and 128, got 129"):
        logprobs_triton.token_logprobs_triton(logits, tokens, 129)
    with pytest.raises(TypeError, match="tokens must be int64"):
        logprobs_triton.token_logprobs_triton(logits, tokens.int(), 1)
