"""Schemas and grammars whose expressions are intersected without bound are told apart from those that are not."""

from typing import Any

import pytest

from quire.core.errors import InvalidRequestError
from quire.server.grammars import structured_outputs
from quire.server.intersections import fault_of_lark, fault_of_schema


def patterns(count: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f"{number}"} for number in range(count)]


def at(schema: dict[str, Any]) -> dict[str, Any]:
    """Of what stands somewhere below."""
    return {"type": "object", "properties": {"a": {"type": "array", "items": schema}}}


CYCLE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}, "name": {"pattern": "x", "format": "date"}}}
SCHEMAS: list[tuple[dict[str, Any], bool]] = [
    ({"allOf": patterns(2), "maxLength": 9}, True),
    ({"allOf": patterns(3)}, False),
    ({"allOf": patterns(2), "format": "date"}, False),
    (at({"allOf": [{"pattern": "a"}, {"allOf": patterns(2)}]}), False),
    ({"allOf": [at({"pattern": "a"}) for _ in range(3)]}, False),
    ({"allOf": [{"properties": {name: {"pattern": "a"}}} for name in "abc"]}, True),
    ({"anyOf": patterns(9), "oneOf": [{"pattern": "a"}, {}]}, True),
    ({"anyOf": patterns(9), "oneOf": [{"allOf": patterns(2)}, {}]}, False),
    ({"$ref": "#/$defs/a", "pattern": "b", "$defs": {"a": {"allOf": patterns(2)}}}, False),
    ({"$ref": "#/$defs/~1%25/0", "$defs": {"/%": patterns(1)}, "format": "date"}, True),
    ({"$ref": "#/$defs/~1%25/0", "$defs": {"/%": [{"allOf": patterns(2)}]}, "format": "date"}, False),
    ({"$defs": {"a": CYCLE}, "$ref": "#/$defs/a"}, True),
    ({"$defs": {"a": CYCLE}, "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}, False),
    ({"properties": {"pattern": {"format": "date"}, "format": {"enum": ["pattern"]}}, "required": ["pattern"]}, True),
]


@pytest.mark.parametrize(("schema", "is_fine"), SCHEMAS, ids=lambda value: str(value)[:60])
def test_schemas(schema: dict[str, Any], is_fine: bool) -> None:
    assert bool(fault_of_schema(schema)) != is_fine


def test_what_is_shared_without_end_is_given_up() -> None:
    """Each level meets the next one eight times over, in two parts."""
    defs: dict[str, Any] = {f"d{i}": {"allOf": []} for i in range(40)}
    for i in range(40):
        one = {"properties": {f"p{j}": {"$ref": f"#/$defs/d{i + 1}"} for j in range(8)}}
        defs[f"d{i}"]["allOf"] = [one, one]
    assert "too many" in fault_of_schema({"$defs": defs, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("grammar", "is_fine"),
    [
        ("start: T\nT: /a+/ & /b/", False),
        ("start: T\nT: ~/a/", False),
        ('start: <"> & <">', False),
        ("start: /a\n/ & /b/", False),
        ('start: "a&b" /~x\\/&/ // & no\n# ~no', True),
        ('start: a~3 a ~ 2..5\na: "x"', True),
        ('root ::= "a&~" [&~]', True),
        ('start: %json {"type": "string", "pattern": "a&"} "x"', True),
        ('start: %json {"allOf": [{"pattern": "a"}, {"pattern": "b"}, {"pattern": "c"}]}', False),
        ('{"grammars": [{"lark_grammar": "start: /a/"}]}', False),
    ],
)
def test_grammars(grammar: str, is_fine: bool) -> None:
    if is_fine:
        structured_outputs({"grammar": grammar})
        assert not fault_of_lark(grammar) or "::=" in grammar
    else:
        assert fault_of_lark(grammar)
        with pytest.raises(InvalidRequestError, match="grammar"):
            structured_outputs({"grammar": grammar})
