"""Expected speed-ups from acceptance and step costs."""

import pytest

from quire.distill.draft_report import Costs, acceptance_table, best_gains, expected_tokens, gains_table
from quire.distill.held_out import Measured


def test_expected_tokens_of_constant_acceptance() -> None:
    # papers: (1 - a^(k+1)) / (1 - a)
    assert expected_tokens([0.8] * 4) == pytest.approx([(1 - 0.8 ** (k + 1)) / 0.2 for k in range(5)])
    assert expected_tokens([0.5, 0.0, 1.0]) == pytest.approx([1.0, 1.5, 1.5, 1.5])


def test_drafts_pay_while_rows_are_free_and_not_when_they_cost() -> None:
    free = Costs({1: 1.0, 5: 1.0}, {1: 0.1})
    (gain,) = best_gains([0.8] * 4, free)
    assert gain.drafts == 4 and gain.speedup == pytest.approx(3.3616 / 1.4)
    dear = Costs({64: 1.0, 320: 5.0}, {64: 0.5})
    (gain,) = best_gains([0.8] * 4, dear)
    assert (gain.drafts, gain.tokens, gain.speedup) == (0, 1.0, 1.0)
    between = Costs({2: 1.0, 10: 2.0}, {2: 0.2})
    (gain,) = best_gains([0.9, 0.0], between)
    assert gain.drafts == 1 and gain.speedup == pytest.approx(1.9 / (0.2 + 1.25))


def test_tables_show_every_domain_and_batch() -> None:
    one = Measured({"all": 0.5}, {"all": 0.4}, {"all": 1.5}, {"all": [0.6, 0.7]}, 2)
    assert "| all | 0.500 -> 0.500 | 0.400 -> 0.400 | 1.50 -> 1.50 | 0.60, 0.70 |" in acceptance_table(one, one)
    gains = best_gains([0.8], Costs({1: 1.0, 2: 1.0}, {1: 0.1}))
    assert "| 1 | 1 | 1.80 | 1.64x | 1 | 1.80 | 1.64x |" in gains_table({"greedy": gains, "sampled": gains})
