"""Structured outputs through a real server: the official client's forms, streams, faults, and an engine that dies."""

import asyncio
import json
import os
import re
import signal
from typing import Any

import httpx
import openai
import pytest

from .conftest import MODEL_NAME, RunningServer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": [1, 2, 3]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
ASK: Any = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Name a thing."}], "max_tokens": 400}


def is_thing(text: str | None) -> bool:
    thing = json.loads(text or "")
    return thing.keys() == {"name", "size"} and len(thing["name"]) <= 12 and thing["size"] in (1, 2, 3)


def test_chat(server: RunningServer) -> None:
    client = server.client()
    before = server.metric("quire:structured_requests_total")
    answer = client.chat.completions.create(**ASK, response_format=FORMAT, temperature=2.0, n=2, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and is_thing(choice.message.content)
    chunks = list(client.chat.completions.create(**ASK, response_format=FORMAT, temperature=0, stream=True))
    assert is_thing("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.metric("quire:structured_requests_total") == before + 2
    assert server.metric("quire:grammar_mask_seconds_total") > 0


async def test_many_kinds_at_once(server: RunningServer) -> None:
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"regex": "[a-z]{2,5}-[0-9]{2}"}, "[a-z]{2,5}-[0-9]{2}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"grammar": 'start: "<" /[a-z]{1,9}/ ">"'}, "<[a-z]{1,9}>"),
        ({"json": {"type": "integer"}}, "-?[0-9]+"),
    ]
    async with server.async_client() as client:

        async def ask(outputs: dict[str, Any] | None, seed: int) -> str:
            extra = {"structured_outputs": outputs} if outputs else {}
            answer = await client.completions.create(
                model=MODEL_NAME, prompt="x = ", max_tokens=60, temperature=1.5, seed=seed, extra_body=extra
            )
            return answer.choices[0].text

        alone = await ask(None, 9)
        asked = [(outputs, pattern, seed) for seed in range(4) for outputs, pattern in kinds]
        *texts, beside = await asyncio.gather(*(ask(outputs, seed) for outputs, _, seed in asked), ask(None, 9))
    assert beside == alone
    for text, (outputs, pattern, _) in zip(texts, asked, strict=True):
        assert re.fullmatch(pattern, text), (text, outputs)


def test_stop_strings_cut_what_is_bound(server: RunningServer) -> None:
    answer = server.client().completions.create(
        model=MODEL_NAME,
        prompt="x",
        max_tokens=60,
        stop="-",
        extra_body={"structured_outputs": {"regex": "[a-z]{3}-1"}},
    )
    assert re.fullmatch("[a-z]{3}", answer.choices[0].text) and answer.choices[0].finish_reason == "stop"


def test_faults(server: RunningServer) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="strin") as caught:
        client.chat.completions.create(**ASK, response_format={"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "strin"}}})  # fmt: skip
    assert caught.value.param == "response_format.json_schema.schema"
    # Only the engine finds out about this one.
    with pytest.raises(openai.BadRequestError, match=r"no choice for more than 32,768 bytes"):
        client.completions.create(
            model=MODEL_NAME, prompt="x", extra_body={"structured_outputs": {"regex": "(a{1000}){1000}"}}
        )
    assert is_thing(client.chat.completions.create(**ASK, response_format=FORMAT).choices[0].message.content)


def test_what_grammars_cost_is_told(server: RunningServer) -> None:
    names = ("grammars_compiled", "grammar_compile_seconds", "grammar_cache_hits", "grammar_forced_tokens")
    before = [server.metric(f"quire:{name}_total") for name in names]
    for _ in range(2):
        outputs = {"regex": "[a-z]{2} followed by what is forced"}
        server.client().completions.create(model=MODEL_NAME, prompt="x", extra_body={"structured_outputs": outputs})
    server.wait_until(lambda: server.metric("quire:grammar_cache_hits_total") > before[2])
    compiled, seconds, found, forced = [
        server.metric(f"quire:{name}_total") - old for name, old in zip(names, before, strict=True)
    ]
    assert (compiled, found) == (1, 1) and 0 < seconds < 10 and forced > 4
    assert server.metric("quire:requests_waiting_for_grammar") == 0


async def test_usual_grammars_do_not_wait_for_hostile_ones(server: RunningServer) -> None:
    """By the order in which they end: the hostile ones were all asked first."""
    names = [[f"{place}_{number}" for number in range(1900)] for place in range(4)]
    schemas = [{"type": "object", "properties": {name: {"type": "string"} for name in part}} for part in names]
    hostile = [{"json": schema} for schema in schemas] + [{"regex": f"(a{{{900 + i}}}){{900}}"} for i in range(4)]
    ended: list[str] = []
    async with server.async_client() as client:

        async def ask(kind: str, outputs: dict[str, Any]) -> None:
            extra = {"structured_outputs": outputs}
            try:
                await client.completions.create(model=MODEL_NAME, prompt="x", max_tokens=4, extra_body=extra)
            except openai.BadRequestError:
                assert kind == "hostile"
            ended.append(kind)

        begun = [asyncio.create_task(ask("hostile", outputs)) for outputs in hostile]
        await asyncio.sleep(0.1)
        await asyncio.gather(*begun, *(ask("usual", {"regex": f"[ab]{{3}}{i}"}) for i in range(4)))
    assert ended[-4:] == ["hostile"] * 4


def test_an_engine_that_died_begins_anew(server: RunningServer) -> None:
    client = server.client()
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt="x",
        max_tokens=3000,
        stream=True,
        extra_body={"structured_outputs": {"regex": "[a-z]{9000}"}},
    )
    next(iter(stream))
    os.kill(server.engine_pid(), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)
    server.wait_until(lambda: httpx.get(server.url + "/ready").status_code == 200)
    assert is_thing(client.chat.completions.create(**ASK, response_format=FORMAT).choices[0].message.content)
