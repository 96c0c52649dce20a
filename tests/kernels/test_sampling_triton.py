"""The fused draw against `kernels.sampling`: the same tokens, whatever the rows' rules."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import sampling

from .triton_interpreter import DEVICES, sampling_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)
TEMPERATURE = [0.0, 0.7, 1.0, 2.0, 1e-35, 1.5, 0.0]
MIN_P = [0.0, 0.0, 0.1, 0.0, 0.0, 0.5, 0.9]


def draw(*arguments: Tensor, penalties: Any = None) -> Tensor:
    """`draw_triton`; logits, temperature, min_p, seeds, positions."""
    logits, temperature, min_p, seeds, positions = arguments
    result: Tensor = sampling_triton.draw_triton(logits, temperature, min_p, seeds, positions, penalties)
    return result


def expected(logits: Tensor, temperature: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    drawn = sampling.sample_full(logits, temperature.clamp(min=1e-30), min_p, seeds, positions)
    return torch.where(temperature == 0, sampling.greedy_tokens(logits), drawn)


@pytest.mark.parametrize("vocabulary", [1, 40, 2048, 5000])
def test_tokens_are_the_references(device: str, vocabulary: int) -> None:
    """Large vocabularies take several programs a row; with fixed seeds no two candidates are within rounding."""
    generator = torch.Generator().manual_seed(vocabulary)
    temperature, min_p = torch.tensor(TEMPERATURE), torch.tensor(MIN_P)
    seeds = torch.randint(-(2**62), 2**62, (len(temperature),), generator=generator)
    wide = torch.randn(len(temperature), vocabulary + 3, generator=generator) * 2
    for step in range(8):
        logits = wide[:, step % 4 : step % 4 + vocabulary]
        positions = torch.arange(len(temperature)) * 1000 + step
        arguments = (logits, temperature, min_p, seeds, positions)
        tokens = draw(*(x.to(device) for x in arguments))
        assert tokens.tolist() == expected(*arguments).tolist()


def test_penalties_are_the_references(device: str) -> None:
    """Rows read their slots' tables; a row without penalties does not look at what its slot has counted."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3000, generator=generator)
    counts = torch.randint(0, 3, (7, 3000), generator=generator, dtype=torch.int32)
    in_prompt = torch.rand(7, 3000, generator=generator) < 0.3
    slots = torch.tensor([6, 0, 3, 3, 1])
    strengths = torch.tensor([[1.3, 0.5, 0.2], [1, 0, 0], [0.8, 0, 0], [1, -1.5, 0], [1, 0, 2]])
    rows = [torch.tensor([0, 0.9, 1, 1, 0.5]), torch.zeros(5), torch.arange(5), torch.arange(5) + 9]
    adjusted = sampling.adjust_penalties(logits, counts[slots], in_prompt[slots], *strengths.unbind(1))
    tables = sampling_triton.Penalties(*(x.to(device) for x in (slots, counts, in_prompt, strengths)))
    before = logits.clone()
    tokens = draw(*(x.to(device) for x in (logits, *rows)), penalties=tables)
    assert tokens.tolist() == expected(adjusted, *rows).tolist() and torch.equal(logits, before)


def test_ties_go_to_the_lowest_token_and_nothing_leaves_the_vocabulary(device: str) -> None:
    logits = torch.zeros(3, 4100, device=device)
    logits[0, [77, 2500, 4099]] = 3.0
    logits[1:] = float("-inf")
    logits[1, 4098] = -5.0
    logits[2] = float("nan")
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    heat = torch.tensor([0.0, 1.0, 1.0], device=device)
    tokens = draw(logits, heat, torch.zeros_like(heat), zeros, zeros).tolist()
    assert tokens[:2] == [77, 4098] and 0 <= tokens[2] < 4100


def test_refusals(device: str) -> None:
    logits, heat = torch.zeros(2, 8, device=device), torch.ones(2, device=device)
    keys = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="logits must be float32"):
        draw(logits.half(), heat, heat, keys, keys)
    with pytest.raises(ValueError, match="min_p must have shape"):
        draw(logits, heat, heat[:1], keys, keys)
    with pytest.raises(TypeError, match="seeds must be int64"):
        draw(logits, heat, heat, keys.int(), keys)
    tables = sampling_triton.Penalties(keys, torch.zeros(3, 7, dtype=torch.int32, device=device), logits > 0, logits)
    with pytest.raises(ValueError, match="output_counts must have shape"):
        draw(logits, heat, heat, keys, keys, penalties=tables)
