"""`/v1/completions`, whole and streamed."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.server.text import Tokenizer

from .conftest import BOS, EOS, events_of
from .fake_client import FakeClient, says

URL = "/v1/completions"


async def post(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post(URL, json={"model": "tiny", "prompt": "hello", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(http: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await http.post(URL, json={"model": "tiny", "prompt": "hello", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def joined(events: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for event in events[:-1] for c in event["choices"] if c["index"] == index)


async def test_whole_response(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    output = tokenizer.encode(" world 😀", False)
    client.script = says([*output, EOS])
    body = await post(http)
    assert body["id"].startswith("cmpl-")
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [{"text": " world 😀", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    prompt = len(tokenizer.encode("hello"))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(output) + 1,
        "total_tokens": prompt + len(output) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert client.requests[0].prompt_ids == tuple(tokenizer.encode("hello"))
    assert client.requests[0].params.max_tokens == 16
    assert client.closed_early == []


async def test_parameters_reach_the_engine(http: httpx.AsyncClient, client: FakeClient) -> None:
    values = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": -5,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "n": 2,
    }
    await post(http, **values, logit_bias={"5": 1, "6": -2.5}, stop_token_ids=[3, 4], logprobs=2, user="someone")
    params = client.requests[0].params
    assert {name: getattr(params, name) for name in values} == values
    assert params.logit_bias == {5: 1.0, 6: -2.5}
    assert params.stop_token_ids == (3, 4)
    assert (params.logprobs, params.prompt_logprobs) == (2, None)
    assert client.requests[0].seed == 2**64 - 5


async def test_requests_without_a_seed_differ(http: httpx.AsyncClient, client: FakeClient) -> None:
    await post(http)
    await post(http, temperature=None, max_tokens=None, stop=None, logit_bias=None, n=None)
    assert client.requests[0].seed != client.requests[1].seed
    assert client.requests[0].params == client.requests[1].params


async def test_stream_shape(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says([*tokenizer.encode(" 你好", False), EOS], reason="length")
    events = await stream(http, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == len(tokenizer.encode(" 你好", False)) + 1
    assert all(event["usage"] is None for event in events[:-2])
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-3])
    assert len({event["id"] for event in events[:-1]}) == 1
    assert joined(events) == " 你好"
    assert not any("\ufffd" in event["choices"][0]["text"] for event in events[:-2])


async def test_usage_so_far_with_every_chunk(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.script = says([70, 71, 72])
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = await stream(http, stream_options=options)
    assert done == "[DONE]" and last["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0 for chunk in chunks)


async def test_no_usage_unless_asked(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says(tokenizer.encode("hello", False))
    assert all("usage" not in event for event in (await stream(http))[:-1])


@pytest.mark.parametrize("form", ["texts", "tokens"])
async def test_several_prompts(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, form: str) -> None:
    texts = ["hello", "world", "The end"]
    prompts: list[Any] = texts if form == "texts" else [tokenizer.encode(text) for text in texts]
    outputs = [tokenizer.encode(f" choice {n}", False) for n in range(2)]
    client.script = says(*outputs)
    body = await post(http, prompt=prompts, n=2)
    assert [c["index"] for c in body["choices"]] == list(range(6))
    assert [c["text"] for c in body["choices"]] == [" choice 0", " choice 1"] * 3
    assert [r.prompt_ids for r in client.requests] == [tuple(tokenizer.encode(text)) for text in texts]
    assert len({r.id for r in client.requests}) == 3
    assert body["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert body["usage"]["completion_tokens"] == 3 * sum(map(len, outputs))
    events = await stream(http, prompt=prompts, n=2)
    assert [joined(events, index) for index in range(6)] == [" choice 0", " choice 1"] * 3


async def test_one_prompt_of_tokens(http: httpx.AsyncClient, client: FakeClient) -> None:
    await post(http, prompt=[BOS, 5, 6])
    assert client.requests[0].prompt_ids == (BOS, 5, 6)


async def test_echo(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says(tokenizer.encode(" world", False), tokenizer.encode(" fox", False))
    body = await post(http, echo=True, n=2)
    assert [c["text"] for c in body["choices"]] == ["hello world", "hello fox"]
    events = await stream(http, echo=True, n=2)
    assert [joined(events, index) for index in range(2)] == ["hello world", "hello fox"]
    body = await post(http, echo=True, prompt=tokenizer.encode("hello"))
    assert body["choices"][0]["text"] == "hello world"


async def test_logprobs(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    output = tokenizer.encode(" world €", False)
    client.script = says(output)
    logprobs = (await post(http, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs.keys() == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert logprobs["token_logprobs"] == [-token / 100 for token in output]
    assert logprobs["tokens"] == [tokenizer.token_text(token) for token in output]
    for top, name in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True):
        assert len(top) == 2
        assert name in top
    assert logprobs["text_offset"][:2] == [0, len(tokenizer.token_text(output[0]))]
    events = await stream(http, logprobs=2)
    chunks = [c["logprobs"] for event in events[:-1] for c in event["choices"] if c["logprobs"]]
    assert {name: [x for chunk in chunks for x in chunk[name]] for name in logprobs} == logprobs


async def test_zero_logprobs_report_the_token_alone(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = says([5])
    top = (await post(http, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"]
    assert top == [{tokenizer.token_text(5): -0.05}]


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo_with_logprobs_scores_the_prompt(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, max_tokens: int
) -> None:
    output = tokenizer.encode(" fox", False)[:1]
    client.script = says(output, reason="length")
    prompt = tokenizer.encode("hello world")
    body = await post(http, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens, n=2)
    shown = output if max_tokens else []
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == "hello world" + tokenizer.decode(shown)
        assert choice["finish_reason"] == "length"
        assert logprobs["token_logprobs"] == [None, *(-token / 100 for token in [*prompt[1:], *shown])]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["tokens"] == [tokenizer.token_text(token) for token in [*prompt, *shown]]
        assert logprobs["text_offset"][0] == 0
        assert logprobs["text_offset"][2] == len(tokenizer.token_text(prompt[1]))
    assert body["usage"]["completion_tokens"] == 2 * len(shown)
    assert client.requests[0].params.max_tokens == max(1, max_tokens)


async def test_a_stop_string_across_tokens(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    output = tokenizer.encode("the quick brown fox", False)
    client.script = says(output)
    body = await post(http, stop=["k br"])
    assert body["choices"][0]["text"] == "the quic"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < len(output)
    assert client.closed_early == [client.requests[0].id]


async def test_a_stop_string_ends_one_choice_only(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = says(tokenizer.encode("hello STOP never", False), tokenizer.encode("a long text, all of it", False))
    for texts in (
        [c["text"] for c in (await post(http, stop="STOP", n=2))["choices"]],
        [joined(events := await stream(http, stop="STOP", n=2), 0), joined(events, 1)],
    ):
        assert texts == ["hello ", "a long text, all of it"]
    assert client.closed_early == []


async def test_stop_strings_wait_for_the_minimum(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    first = tokenizer.encode("x. ", False)
    client.script = says([*first, *tokenizer.encode("y. z", False)])
    body = await post(http, stop=".", min_tokens=len(first))
    assert body["choices"][0]["text"] == "x. y"


async def test_what_was_withheld_is_shown_at_the_end(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = says(tokenizer.encode("hello EN", False), reason="length")
    body = await post(http, stop="END")
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hello EN", "length")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab 你😀", max_size=20),
    stops=st.lists(st.text(alphabet="ab 你", min_size=1, max_size=4), max_size=3),
    per_event=st.integers(1, 5),
)
async def test_streamed_and_whole_text_are_the_reference(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, text: str, stops: list[str], per_event: int
) -> None:
    client.script = says(tokenizer.encode(text, False), per_event=per_event)
    whole = await post(http, stop=stops)
    events = await stream(http, stop=stops, stream_options={"include_usage": True})
    ends = [(at + len(stop), -len(stop)) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: sum(min(ends))] if ends else text
    assert whole["choices"][0]["text"] == joined(events) == expected
    assert whole["usage"] == events[-2]["usage"]


async def test_special_tokens_can_be_shown(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says([*tokenizer.encode("hello", False), EOS])
    assert (await post(http, skip_special_tokens=False))["choices"][0]["text"] == "hello<|end|>"
    await post(http, add_special_tokens=False)
    assert client.requests[-1].prompt_ids == tuple(tokenizer.encode("hello", False))
