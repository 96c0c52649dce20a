"""Sampling rules against a naive per-row reference, by exact sets and by chi-square tests with fixed seeds."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.kernels import sampling
from quire.kernels.noise import gumbel_noise, random_bits
from quire.kernels.sampling import (
    adjust_bias,
    adjust_penalties,
    finite_rows,
    forbid,
    greedy_tokens,
    rank_tokens,
    sample_full,
    sample_truncated,
    token_logprobs,
    top_logprobs,
)

DRAWS = 20_000
TOY = [2.0, 1.5, 1.5, 0.3, 0.0, -0.4, -1.0, -3.0]
# The seeds are fixed, so each test always gives the same p-value; below this a correct sampler is one in a thousand.
SIGNIFICANCE = 1e-3


def naive_distribution(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Probability of each token after the rules, in plain Python floats."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept: list[int] = []
    mass = 0.0
    for i in order:
        if kept and top_p < 1.0 and mass >= top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def draw(logits: list[float], rows: int = DRAWS, seed: int = 3, **rules: Any) -> Tensor:
    """[rows] tokens, each at a position of its own."""
    table = torch.tensor(logits).expand(rows, -1)
    settings = {
        name: torch.full((rows,), float(rules.get(name, default)))
        for name, default in (("temperature", 1.0), ("min_p", 0.0), ("top_p", 1.0))
    }
    top_k = torch.full((rows,), int(rules.get("top_k", 0)))
    seeds, positions = torch.full((rows,), seed), torch.arange(rows)
    if "top_k" in rules or "top_p" in rules:
        return sample_truncated(
            table, settings["temperature"], top_k, settings["top_p"], settings["min_p"], seeds, positions
        )
    return sample_full(table, settings["temperature"], settings["min_p"], seeds, positions)


def p_value(tokens: Tensor, expected: list[float]) -> float:
    """Chi-square test; a token of probability zero must not occur at all."""
    counts = torch.bincount(tokens, minlength=len(expected)).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0.0)
    support = [(count, p * len(tokens)) for count, p in zip(counts, expected, strict=True) if p > 0.0]
    if len(support) == 1:
        return 1.0
    return float(stats.chisquare([c for c, _ in support], [e for _, e in support]).pvalue)


RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_k": 4, "top_p": 0.8},
    {"top_k": 6, "top_p": 0.95, "min_p": 0.15, "temperature": 1.7},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_draws_follow_the_exact_distribution(rules: dict[str, Any]) -> None:
    expected = naive_distribution(TOY, **rules)
    assert p_value(draw(TOY, **rules), expected) > SIGNIFICANCE


@pytest.mark.parametrize("rules", [r for r in RULES if "top_k" in r or "top_p" in r], ids=str)
def test_full_sort_and_candidates_agree(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(TOY, rows=500, **rules)
    monkeypatch.setattr(sampling, "CANDIDATES", 3)
    assert torch.equal(draw(TOY, rows=500, **rules), whole)


def test_low_temperatures_end_in_the_argmax() -> None:
    for temperature in (1e-6, 1e-38, 1e-46):
        assert draw([1.0, 1.001, -5.0], rows=50, temperature=temperature).eq(1).all()


def test_ties_go_to_the_lowest_id() -> None:
    assert greedy_tokens(torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0]])).tolist() == [1, 0]
    assert draw([1.0, 3.0, 3.0], rows=50, top_k=1).eq(1).all()
    assert draw([1.0, 3.0, 3.0], rows=50, top_p=0.1).eq(1).all()
    assert rank_tokens(torch.tensor([[2.0, 5.0, -1.0, 5.0, -3.0]]), 5).tolist() == [[1, 3, 0, 2, 4]]


@pytest.mark.parametrize("vocab", [50, 5000])
def test_a_row_is_drawn_the_same_alone_and_among_others(vocab: int) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = 24
    logits = torch.randn(rows, vocab, generator=generator) * 2
    temperature = torch.rand(rows, generator=generator) + 0.2
    top_k = torch.randint(0, 2000, (rows,), generator=generator)
    top_k[::3] = 0
    top_p = torch.rand(rows, generator=generator)
    top_p[::2] = 1.0
    min_p = torch.rand(rows, generator=generator) * 0.2
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    arguments = (logits, temperature, top_k, top_p, min_p, seeds, torch.arange(rows))
    together = sample_truncated(*arguments)
    for row in range(rows):
        one = slice(row, row + 1)
        cuts = temperature[one], top_k[one], top_p[one], min_p[one]
        alone = sample_truncated(logits[one], *cuts, seeds[one], torch.arange(rows)[one])
        assert int(alone) == int(together[row])


def test_penalties_follow_their_definition() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, 1.0], [2.0, -2.0, 2.0, 1.0]])
    counts = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    in_prompt = torch.tensor([[False, False, True, False], [False, True, False, False]])
    strength = torch.tensor([2.0, 4.0])
    result = adjust_penalties(logits, counts, in_prompt, strength, torch.tensor([0.5, 0.5]), torch.tensor([0.25, 9.0]))
    assert result[0].tolist() == [1.0 - 0.5 - 0.75, -4.0 - 0.5 - 0.25, 1.0, 1.0]
    assert result[1].tolist() == [2.0, -8.0, 2.0, 1.0]


def test_bias_adds_and_forbidden_tokens_never_win() -> None:
    logits = torch.tensor([TOY, TOY])
    adjust_bias(logits, torch.tensor([0, 0]), torch.tensor([7, 1]), torch.tensor([100.0, -1.0]))
    forbid(logits, torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert greedy_tokens(logits).tolist() == [7, 2]
    assert logits[0, 1] == 0.5 and logits[1, :2].isneginf().all()
    tokens = draw([float("-inf"), float("-inf"), *TOY[2:]], top_k=5)
    assert p_value(tokens, [0.0, 0.0, *naive_distribution(TOY[2:], top_k=5)]) > SIGNIFICANCE


def test_finite_rows_allow_forbidden_tokens_but_no_nan() -> None:
    bad = float("nan"), float("inf"), float("-inf")
    rows = torch.tensor([[0.0, 1.0], [bad[0], 1.0], [1.0, bad[1]], [bad[2], bad[2]], [bad[2], 1.0]])
    assert finite_rows(rows).tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("vocab", [1, 7, 33, 2048, 5001])
def test_cpu_maxima_equal_torchs(vocab: int) -> None:
    """Ties, infinities and NaN anywhere in the row, rows apart in memory."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-9, 9, (60, vocab + 3), generator=generator).float()[:, :vocab]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for row in range(30):
        logits[row, torch.randint(0, vocab, (1,), generator=generator)] = special[row % 3]
    logits[59] = -torch.inf
    assert torch.equal(finite_rows(logits, "cpu"), finite_rows(logits))
    numbers = ~logits.isnan().any(-1)
    assert torch.equal(greedy_tokens(logits, "cpu")[numbers], greedy_tokens(logits)[numbers])


def test_logprobs_are_of_the_given_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(70, 100, generator=generator)
    tokens = torch.randint(0, 100, (70,), generator=generator)
    chosen, ids, values = token_logprobs(logits, tokens, 5)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), expected.sort(dim=-1, descending=True).values[:, :5], rtol=0, atol=1e-5)
    assert torch.equal(ids, logits.topk(5).indices)
    assert token_logprobs(logits, tokens, 0)[1].shape == (70, 0)
    assert token_logprobs(logits[:, :3], tokens % 3, 20)[1].shape == (70, 3)
    assert all(map(torch.equal, top_logprobs(logits, 5), (ids, values)))
    assert top_logprobs(logits[:, :3], 20)[0].shape == (70, 3)


def grid(axis: str, size: int) -> Tensor:
    """[size] consecutive random words along one argument, the others fixed."""
    zero, line = torch.zeros(1, dtype=torch.int64), torch.arange(size)
    if axis == "token":
        return random_bits(zero + 9, zero + 4, line)[0]
    seeds, positions = (line, torch.full_like(line, 4)) if axis == "seed" else (torch.full_like(line, 9), line)
    return random_bits(seeds, positions, zero + 17)[:, 0]


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_bits_are_uniform_and_independent_along_each_argument(axis: str) -> None:
    words = grid(axis, 1 << 17)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((words >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    top = ((words >> 28) & 15).long()
    for lag in (1, 2, 64):
        pairs = torch.bincount(top[:-lag] * 16 + top[lag:], minlength=256)
        assert stats.chisquare(pairs).pvalue > SIGNIFICANCE
    flips = torch.stack([((words[:-1] ^ words[1:]) >> bit) & 1 for bit in range(32)]).double().mean(1)
    assert (flips - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(words))  # five standard deviations


def test_streams_of_neighbouring_keys_are_not_shifted_copies() -> None:
    tokens = torch.arange(4096)
    words = random_bits(torch.tensor([0, 1, 2, 2**62, -1]), torch.tensor([0, 0, 1, 0, 0]), tokens)
    assert len(words.unique()) > words.numel() - 10  # about words.numel()**2 / 2**33 = 0.05 collisions by chance


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.arange(64), torch.arange(64), torch.arange(2048))
    assert noise.isfinite().all()
    assert stats.kstest(noise.flatten().double().numpy(), "gumbel_r").pvalue > SIGNIFICANCE
    per_row = gumbel_noise(torch.arange(64), torch.arange(64), torch.arange(2048).expand(64, -1))
    assert torch.equal(noise, per_row)


def unsigned_mix(seed: int, position: int, token: int) -> int:
    """The documented mixing function in unsigned Python integers."""

    def mix64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + golden) % 2**64) + position * golden) % 2**64)
    x = (token * 0x9E3779B9 + key) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32 ^ key >> 32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_bits_are_the_documented_function() -> None:
    """A seeded request must give the same text on every device and in every release."""
    seeds, positions, tokens = [0, -1, 2**63 - 1, 77], [0, 12345, 2**31, 1], [0, 1, 151_935]
    words = random_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    expected = [[unsigned_mix(s % 2**64, p, t) for t in tokens] for s, p in zip(seeds, positions, strict=True)]
    assert (words.long() % 2**32).tolist() == expected
