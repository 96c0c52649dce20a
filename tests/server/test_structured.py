"""Structured outputs over HTTP: every form becomes the same grammar for the engine, and what is wrong is told first."""

import json
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from quire.core.errors import InvalidRequestError
from quire.core.request import GRAMMAR_KINDS, Grammar
from quire.server.grammars import MAX_GRAMMAR_CHARS, structured_outputs
from quire.server.text import Tokenizer

from .conftest import EOS
from .fake_client import FakeClient, says
from .test_errors import check_body

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"], "additionalProperties": False}
WORDS = {
    "json_schema": (['{"é":5}', '{\n  "é": -17\n}'], ["{}", '{"é": "5"}', '{"é":5,"b":1}', '{  "é":5}']),
    "json_object": (["{}", '{"a": [1, {"b": null}]}'], ["[]", "5"]),
    "regex": (["ab/12", "z/9"], ["/1", "ab"]),
    "choice": (["yes", "n.o", 'a"\\b\n', "é|😀"], ["nxo", "yes!"]),
    "grammar": (["1+2", "7"], ["1+", "+"]),
}
"""By kind: texts that are allowed, and such as are not."""
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("json_schema", {"structured_outputs": {"json": SCHEMA}}),
    ("json_schema", {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}}),
    ("json_schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
    ("json_object", {"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}),
    ("json_object", {"response_format": {"type": "json_object"}}),
    ("regex", {"structured_outputs": {"regex": "[a-z]+/[0-9]+", "disable_any_whitespace": False}}),
    ("choice", {"structured_outputs": {"choice": WORDS["choice"][0]}}),
    ("grammar", {"structured_outputs": {"grammar": 'start: n ("+" n)*\nn: /[0-9]/'}}),
    ("grammar", {"structured_outputs": {"grammar": 'root ::= n ("+" n)*\nn ::= [0-9]'}}),
]
NOTHING: list[dict[str, Any]] = [
    {},
    {"response_format": None, "structured_outputs": None},
    {"response_format": {"type": "text"}},
    {"structured_outputs": False},
]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}


@pytest.fixture(scope="module")
def accepts(tokenizer: Tokenizer) -> Any:
    tokens = LLTokenizer(tokenizer.backend.to_str(), eos_token=[EOS])

    def accepts(grammar: Grammar, text: str) -> bool:
        matcher = LLMatcher(tokens, grammar.source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.consume_tokens(tokens.tokenize_str(text)) and matcher.is_accepting()

    return accepts


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("kind", "fields"), FORMS, ids=lambda value: str(value)[:60])
async def test_forms(
    http: httpx.AsyncClient, client: FakeClient, accepts: Any, route: str, kind: str, fields: dict[str, Any]
) -> None:
    client.script = says([5, EOS])
    response = await http.post(route, json=ROUTES[route] | fields)
    assert response.status_code == 200, response.text
    (request,) = client.requests
    assert request.grammar is not None and request.grammar.kind == kind
    for place, texts in enumerate(WORDS[kind]):
        for text in texts:
            assert accepts(request.grammar, text) == (place == 0), text
    metrics = (await http.get("/metrics")).text
    for other in GRAMMAR_KINDS:
        assert f'quire:structured_requests_total{{kind="{other}",model_name="tiny"}} {float(other == kind)}' in metrics


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fields", NOTHING, ids=str)
async def test_nothing_asked(http: httpx.AsyncClient, client: FakeClient, route: str, fields: dict[str, Any]) -> None:
    client.script = says([5, EOS])
    assert (await http.post(route, json=ROUTES[route] | fields)).status_code == 200
    assert client.requests[0].grammar is None


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


BAD: list[tuple[dict[str, Any], str, str]] = [
    (outputs(regex="(a"), "structured_outputs.regex", "unclosed group"),
    (outputs(regex="a(?=b)"), "structured_outputs.regex", "look-around"),
    (outputs(regex=5), "structured_outputs.regex", "string"),
    (outputs(regex="a" * (MAX_GRAMMAR_CHARS + 1)), "structured_outputs.regex", "131,072"),
    (outputs(json="{bad"), "structured_outputs.json", "valid JSON"),
    (outputs(json="[" * 9000), "structured_outputs.json", "too deeply"),
    (outputs(json=[1]), "structured_outputs.json", "object"),
    (outputs(json={"type": "strin"}), "structured_outputs.json", "strin"),
    (outputs(json={"type": "string", "not": {}}), "structured_outputs.json", "not"),
    (outputs(json={"$ref": "#/nowhere"}), "structured_outputs.json", "nowhere"),
    (outputs(choice=[]), "structured_outputs.choice", "non-empty"),
    (outputs(choice=["a", 1]), "structured_outputs.choice", "strings"),
    (outputs(choice="a"), "structured_outputs.choice", "strings"),
    (outputs(grammar="start: x"), "structured_outputs.grammar", "unknown name"),
    (outputs(grammar="root ::= ("), "structured_outputs.grammar", "GBNF"),
    (outputs(), "structured_outputs", "exactly one"),
    (outputs(regex="a", choice=["a"]), "structured_outputs", "exactly one"),
    (outputs(structural_tag="{}"), "structured_outputs.structural_tag", "no such field"),
    ({"structured_outputs": "a"}, "structured_outputs", ""),
    (schema({"type": "integer", "minimum": 5, "maximum": 3}), "response_format.json_schema.schema", "minimum"),
    (schema(None), "response_format.json_schema.schema", "object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
    ({"response_format": "json_object"}, "response_format", ""),
    ({"response_format": {"type": "json_object"}} | outputs(regex="a"), "response_format", "exclude"),
    ({"guided_regex": "a"}, "guided_regex", "not supported"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("fields", "param", "why"), BAD, ids=lambda value: str(value)[:50])
async def test_what_is_wrong_is_told(
    http: httpx.AsyncClient, client: FakeClient, route: str, fields: dict[str, Any], param: str, why: str
) -> None:
    error = check_body(await http.post(route, content=json.dumps(ROUTES[route] | fields)), 400)
    assert error["param"] == param and why in error["message"] and len(error["message"]) < 600
    assert client.requests == []


def test_offline_it_is_told_too() -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        structured_outputs({"regex": "(a"})
    with pytest.raises(InvalidRequestError, match="no such field"):
        structured_outputs({"yaml": True})
