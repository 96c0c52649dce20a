"""The rows: questions can be answered from the row itself, weights and lengths are right."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from quire.distill.corpus import Corpus, is_held_out, standard_library
from quire.distill.recall import RecallTrials
from quire.distill.samples import VALUE_WEIGHT, Mixture, SampleMaker


def runs(positions: list[int]) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of successive positions."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found


def occurrences(ids: list[int], pattern: list[int]) -> list[int]:
    """Positions where `pattern` begins."""
    return [i for i in range(len(ids) - len(pattern) + 1) if ids[i : i + len(pattern)] == pattern]


@pytest.mark.parametrize("index", range(12))
def test_recalled_values_stand_earlier_behind_the_same_name(maker: SampleMaker, index: int) -> None:
    row = maker.recall_row(np.random.default_rng(index), index, 600)
    assert len(row.ids) == len(row.weights) == 600
    assert row.value, "a recall row asks for something"
    for start, stop in runs(row.value):
        assert all(w == VALUE_WEIGHT for w in row.weights[start:stop])
        asked = row.ids[start - 3 : stop]
        assert occurrences(row.ids, asked)[0] < start - 3


def test_only_asked_values_have_the_high_weight(maker: SampleMaker) -> None:
    row = maker.recall_row(np.random.default_rng(3), 3, 600)
    assert [i for i, w in enumerate(row.weights) if w == VALUE_WEIGHT] == row.value


@pytest.mark.parametrize("kind", ["recall", "copy", "random_copy", "chat", "code"])
def test_rows_have_the_length_asked_for_and_depend_on_the_index_alone(maker: SampleMaker, kind: str) -> None:
    shares = {name: float(name == kind) for name in ("recall", "copy", "random_copy", "chat")}
    for index in range(5):
        ids, weights = maker.row(index, 256, Mixture(**shares))
        again, _ = maker.row(index, 256, Mixture(**shares))
        assert ids.shape == (257,) and weights.shape == (256,)
        assert np.array_equal(ids, again)


def test_random_tokens_come_twice(maker: SampleMaker) -> None:
    row = maker.random_copy_row(np.random.default_rng(0), 0, 400)
    assert len(occurrences(row.ids, row.ids[:8])) >= 2


def test_binding_tokens_join_to_the_line(maker: SampleMaker, tokenizer: Tokenizer) -> None:
    for value in ("4217", '"abc"', "foo_bar"):
        bound = maker.binding("red_fox_7", value)
        assert bound.head + bound.value + bound.end == tokenizer.encode(f"red_fox_7 = {value}\n").ids


def test_trials_place_the_value_at_the_distance(maker: SampleMaker, corpus: Corpus) -> None:
    trials = RecallTrials(corpus, maker)
    for keys in (1, 8):
        ids, count = trials.recall_trial(np.random.default_rng(5), 400, keys)
        first = occurrences(ids, ids[-count - 3 :])[0] + 3
        assert abs(len(ids) - count - first - 400) <= 2


def test_held_out_files_are_a_fixed_small_part() -> None:
    files = standard_library(limit=400)
    held = [f.path for f in files if is_held_out(f.path)]
    assert 0 < len(held) < 40
    assert held == [f.path for f in standard_library(limit=400) if is_held_out(f.path)]
