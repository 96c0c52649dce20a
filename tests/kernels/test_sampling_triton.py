"""The fused draw against `kernels.sampling`: the same tokens, whatever the rows' rules."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import sampling
from quire.kernels.distributions import truncated_logits

from .triton_interpreter import DEVICES, cuts_triton, rows_triton, sampling_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)
TEMPERATURE = [0.0, 0.7, 1.0, 2.0, 1e-35, 1.5, 0.0]
MIN_P = [0.0, 0.0, 0.1, 0.0, 0.0, 0.5, 0.9]


def draw(*arguments: Tensor, penalties: Any = None, truncation: Any = None) -> Tensor:
    """`draw_triton`; logits, temperature, min_p, seeds, positions."""
    logits, temperature, min_p, seeds, positions = arguments
    result: Tensor = sampling_triton.draw_triton(logits, temperature, min_p, seeds, positions, penalties, truncation)
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
    tables = rows_triton.Penalties(*(x.to(device) for x in (slots, counts, in_prompt, strengths)))
    before = logits.clone()
    tokens = draw(*(x.to(device) for x in (logits, *rows)), penalties=tables)
    assert tokens.tolist() == expected(adjusted, *rows).tolist() and torch.equal(logits, before)


def test_tokens_before_a_row_count_as_its_output(device: str) -> None:
    """Rows of one slot, each after one more draft token; the slot's own table stays as it is."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 3000, generator=generator)
    prefix = torch.tensor([[-1, -1, -1], [7, -1, -1], [7, 2999, -1], [7, 2999, 7]])
    logits[:, 7], logits[:, 2999] = 9.0, 8.5
    counts = torch.zeros(2, 3000, dtype=torch.int32)
    strengths = torch.tensor([[1.1, 0.5, 1.5]]).repeat(4, 1)
    slots, rows = torch.ones(4, dtype=torch.int64), (torch.zeros(4), torch.zeros(4), torch.arange(4), torch.arange(4))
    seen = counts[slots].scatter_add_(1, prefix.clamp(min=0), (prefix >= 0).int())
    adjusted = sampling.adjust_penalties(logits, seen, seen > 9, *strengths.unbind(1))
    moved = [x.to(device) for x in (slots, counts, counts > 0, strengths, prefix)]
    tokens = draw(*(x.to(device) for x in (logits, *rows)), penalties=rows_triton.Penalties(*moved))
    assert tokens.tolist() == adjusted.argmax(-1).tolist() == [7, 2999, 7, 2999]


CUTS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (40, 0.9, 0.0), (9, 0.5, 0.3), (0, 0.97, 0.05), (3000, 0.999, 0.0)]
CUTS += [(0, 1e-6, 0.0), (1, 0.5, 0.0), (0, 1.0, 0.4), (2, 1.0, 1.0)]
"""top-k, top-p, min-p."""


def truncated(device: str, cuts: list[tuple[int, float, float]] = CUTS) -> tuple[Tensor, Any]:
    """min_p and what the kernels take of cuts."""
    top_k, top_p, min_p = (torch.tensor(column, device=device) for column in zip(*cuts, strict=True))
    return min_p, cuts_triton.Truncation(top_k, top_p)


@pytest.mark.parametrize(("vocabulary", "spread", "steps"), [(1, 1.0, 0), (40, 30.0, 0), (2500, 3.0, 3)])
def test_cut_rows_keep_the_references_tokens(device: str, vocabulary: int, spread: float, steps: int) -> None:
    """Flat and sharp rows, with and without many equal logits: the same tokens stay, at the same scaled logits."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(len(CUTS), vocabulary, generator=generator) * spread
    logits = (logits * steps / spread).round() if steps else logits
    logits[:, 1::7] = float("-inf")
    min_p, truncation = truncated("cpu")
    heat = torch.linspace(0.3, 2.0, len(CUTS))
    expected = truncated_logits(logits, heat, truncation.top_k, truncation.top_p, min_p)
    there = truncated(device)
    result = sampling_triton.processed_logits_triton(logits.to(device), heat.to(device), *there).cpu()
    assert torch.equal(result.isfinite(), expected.isfinite())
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_cut_rows_draw_the_references_tokens(device: str) -> None:
    """Beside rows that nothing cuts; a row that is not finite takes nothing from the others."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(CUTS), 2300, generator=generator) * 4
    min_p, truncation = truncated("cpu")
    heat = torch.linspace(0.4, 1.5, len(CUTS))
    seeds = torch.randint(-(2**62), 2**62, (len(CUTS),), generator=generator)
    for step in range(2):
        positions = torch.arange(len(CUTS)) + 100 * step
        cuts = (truncation.top_k, truncation.top_p, min_p)
        expected = sampling.sample_truncated(logits, heat, *cuts, seeds, positions)
        broken = logits.clone()
        broken[step] = float("nan")
        moved = [x.to(device) for x in (broken, heat, min_p, seeds, positions)]
        tokens = draw(*moved, truncation=truncated(device)[1]).tolist()
        good = [row for row in range(len(CUTS)) if row != step]
        assert [tokens[row] for row in good] == expected[good].tolist() and 0 <= tokens[step] < 2300


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
    tables = rows_triton.Penalties(keys, torch.zeros(3, 7, dtype=torch.int32, device=device), logits > 0, logits)
    with pytest.raises(ValueError, match="output_counts must have shape"):
        draw(logits, heat, heat, keys, keys, penalties=tables)
