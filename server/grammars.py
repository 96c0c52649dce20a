"""Structured outputs: what a body asks for, OpenAI's way or vLLM's, as a `Grammar` that was checked.

Whoever asks hears of a fault here, before the engine does; the engine alone knows the tokens, and may still refuse.
"""

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from ..core.background import background_pool
from ..core.errors import InvalidRequestError
from ..core.request import MAX_GRAMMAR_FUEL, MAX_GRAMMAR_SYMBOLS, Grammar, GrammarKind
from .errors import invalid_request
from .intersections import fault_of_lark, fault_of_schema

MAX_GRAMMAR_CHARS = 2**17
"""Longest schema, expression, grammar or list of choices, as text."""
MAX_REASON_CHARS = 400
_WHITESPACE = r"[ \t]|\r?\n[ \t]{0,40}"
"""Where JSON may have any, a blank or one indented line break: a model that is bent to JSON likes to go on with
whitespace for ever."""
_ANY_OBJECT = '{"type": "object"}'
_REGEX_SIGNS = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/])")


def _schema_text(value: Any) -> str:
    """A JSON schema, given as a value or as text, as text."""
    try:
        schema = msgspec.json.decode(value) if isinstance(value, str) else value
        if schema is True or isinstance(schema, dict):
            return msgspec.json.encode({} if schema is True else schema).decode()
    except RecursionError as error:
        raise ValueError("the JSON schema is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(f"the JSON schema is not valid JSON: {str(error)[:200]}") from error
    raise ValueError("the JSON schema must be an object, or true, which allows any JSON")


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
        raise ValueError("a non-empty list of strings is wanted")
    return value


Schema = Annotated[
    str, PlainValidator(_schema_text), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})
]
Choices = Annotated[
    list[str], PlainValidator(_choices), WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1})
]


class JsonSchema(BaseModel):
    """OpenAI's `response_format.json_schema`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None
    """Changes nothing: the schema always holds."""


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: exactly one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """Lark, or GBNF as llama.cpp has it."""
    json_object: bool | None = None


def _wanted(value: Any) -> Any:
    """Without fields that ask for nothing, known or not."""
    if not isinstance(value, dict):
        return None if value is False else value
    return {name: asked for name, asked in value.items() if asked is not None and asked is not False}


class StructuredBody(BaseModel):
    """The part of a request's body that says what the output must look like."""

    model_config = ConfigDict(strict=True, extra="ignore")

    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(_wanted)] = None


async def asked_grammar(body: StructuredBody) -> Grammar | None:
    """What the body binds its output to. Raises `InvalidRequestError`, naming the field at fault."""
    asked = _of_format(body.response_format) or _of_outputs(body.structured_outputs)
    if asked is None:
        return None
    if body.response_format is not None and body.response_format.type != "text" and body.structured_outputs is not None:
        raise InvalidRequestError("response_format and structured_outputs exclude each other", param="response_format")
    # A nasty one takes a third of a second.
    return await asyncio.get_running_loop().run_in_executor(_checkers(), _grammar, *asked)


def structured_outputs(fields: Mapping[str, Any]) -> Grammar:
    """What vLLM's `structured_outputs` with these fields binds outputs to. Raises `InvalidRequestError`."""
    try:
        asked = _of_outputs(StructuredBody.model_validate({"structured_outputs": dict(fields)}).structured_outputs)
    except ValidationError as error:
        raise invalid_request(error) from error
    assert asked is not None
    return _grammar(*asked)


def _grammar(kind: GrammarKind, text: str, param: str) -> Grammar:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"{param} has {len(text):,} characters, at most {MAX_GRAMMAR_CHARS:,} are allowed", param=param
        )
    source, fault = _checked(kind, text)
    if fault:
        raise InvalidRequestError(f"{param} cannot be used: {fault}", param=param)
    return Grammar(kind, source)


_Asked = tuple[GrammarKind, str, str]
"""Kind, text and field."""


def _of_format(asked: ResponseFormat | None) -> _Asked | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return "json_object", _ANY_OBJECT, "response_format"
    if asked.json_schema is None:
        raise InvalidRequestError("the type json_schema needs a json_schema", param="response_format.json_schema")
    return "json_schema", asked.json_schema.schema_, "response_format.json_schema.schema"


def _of_outputs(asked: StructuredOutputs | None) -> _Asked | None:
    if asked is None:
        return None
    found: list[_Asked] = []
    if asked.json_ is not None:
        found.append(("json_schema", asked.json_, "structured_outputs.json"))
    if asked.regex is not None:
        found.append(("regex", asked.regex, "structured_outputs.regex"))
    if asked.choice is not None:
        # One expression: a grammar would be followed in all its branches at once, and only so many of them.
        expression = "|".join(_REGEX_SIGNS.sub(r"\\\1", choice) for choice in asked.choice)
        found.append(("choice", expression, "structured_outputs.choice"))
    if asked.grammar is not None:
        found.append(("grammar", asked.grammar, "structured_outputs.grammar"))
    if asked.json_object:
        found.append(("json_object", _ANY_OBJECT, "structured_outputs.json_object"))
    if len(found) != 1:
        raise InvalidRequestError(
            f"exactly one of json, regex, choice, grammar and json_object is wanted, got {len(found)}",
            param="structured_outputs",
        )
    return found[0]


@cache
def _checkers() -> ThreadPoolExecutor:
    return background_pool("quire-grammar")


@lru_cache(maxsize=256)
def _checked(kind: GrammarKind, text: str) -> tuple[str, str]:
    """The grammar in llguidance's format, and what is wrong with it, if anything is."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from  # 10 MB: paid by servers that are asked for it

    try:
        if kind in ("json_object", "json_schema"):
            source = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})
            fault = fault_of_schema(msgspec.json.decode(text))
        elif kind == "grammar":
            source = grammar_from("grammar", text)
            fault = fault_of_lark(source)
        else:
            source, fault = grammar_from("regex", text), ""
    except ValueError as error:
        fault = str(error)
    if fault:
        return "", _reason(fault)
    limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR_SYMBOLS, initial_lexer_fuel=MAX_GRAMMAR_FUEL)
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(source, limits=limits)
    return source, _reason(reasons[0]) if is_wrong else ""


def _reason(text: str) -> str:
    """On one line."""
    return re.sub(r"\s+", " ", text).strip()[:MAX_REASON_CHARS]
