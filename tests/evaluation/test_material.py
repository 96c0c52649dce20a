"""Filler, facts and where they are put."""

import numpy as np
import pytest

from quire.core.config import embedded_model
from quire.core.errors import InvalidRequestError
from quire.evaluation.material import Filler, Material
from quire.server.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(embedded_model()))


@pytest.fixture(scope="module", params=["code", "prose"])
def material(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Material:
    return Material(tokenizer, request.param)


def test_filler_has_the_length_and_begins_with_a_line(material: Material) -> None:
    rng = np.random.default_rng(0)
    for length in (1, 50, 700):
        filler = material.filler(rng, length)
        assert len(filler.ids) == length
        assert "\n" + material.tokenizer.decode(filler.ids) in material.text
    with pytest.raises(InvalidRequestError, match="are wanted"):
        material.filler(rng, 10**9)


def test_facts_split_where_the_value_begins(material: Material) -> None:
    for fact in material.facts(np.random.default_rng(1), 20):
        decode = material.tokenizer.decode
        assert fact.value in decode(fact.answer) and fact.value not in decode(fact.head)
        assert fact.line == material.tokens(decode(fact.line))
        assert decode(fact.line).endswith("\n")


def test_names_and_values_are_unique_and_foreign_to_the_filler(material: Material) -> None:
    rng = np.random.default_rng(2)
    names, values = material.names(rng, 60), material.values(rng, 60)
    assert len(set(names)) == len(set(values)) == 60
    assert not any(word in material.text for word in names + values)
    assert not any(a != b and a.startswith(b) for a in names for b in names)


def test_lines_go_to_the_nearest_line_start() -> None:
    filler = Filler(list(range(10)), np.array([3, 6]))
    assert filler.insert([(1.0, [99]), (0.0, [77]), (0.5, [88])]) == [77, *range(6), 88, *range(6, 10), 99]
