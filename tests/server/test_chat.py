"""`/v1/chat/completions`, whole and streamed."""

from typing import Any

import httpx
import pytest

from quire.server.text import Tokenizer

from .conftest import EOS, events_of
from .fake_client import FakeClient, says

URL = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


async def post(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post(URL, json={"model": "tiny", **ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(http: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await http.post(URL, json={"model": "tiny", **ASK, "stream": True, **body})
    assert response.status_code == 200, response.text
    return events_of(response.text)


async def test_whole_response(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says([*tokenizer.encode("hello world", False), EOS])
    body = await post(http)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["prompt_tokens"] == len(client.requests[0].prompt_ids)
    assert tokenizer.decode(client.requests[0].prompt_ids, False) == "<|bos|>user: hi\nassistant:"
    assert client.requests[0].params.max_tokens is None


async def test_stream_shape(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says(tokenizer.encode("hello", False), tokenizer.encode("😀", False))
    events = await stream(http, n=2, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert (events[-2]["choices"], events[-2]["usage"]["total_tokens"] > 0) == ([], True)
    chunks = [event["choices"][0] for event in events[:-2]]
    assert all(event["object"] == "chat.completion.chunk" and event["usage"] is None for event in events[:-2])
    for index, text in enumerate(["hello", "😀"]):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert (mine[-1]["delta"], mine[-1]["finish_reason"]) == ({}, "stop")
        assert all(chunk["finish_reason"] is None for chunk in mine[:-1])
        assert all(chunk["delta"].keys() == {"content"} for chunk in mine[1:-1])
        assert "".join(chunk["delta"].get("content", "") for chunk in mine) == text


async def test_logprobs(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    output = tokenizer.encode("hello", False)
    client.script = says(output)
    logprobs = (await post(http, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs["content"]] == [tokenizer.token_text(token) for token in output]
    assert bytes(byte for entry in logprobs["content"] for byte in entry["bytes"]) == b"hello"
    assert all(len(entry["top_logprobs"]) == 3 for entry in logprobs["content"])
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in logprobs["content"])
    events = await stream(http, logprobs=True, top_logprobs=3)
    chunks = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [entry for chunk in chunks if chunk for entry in chunk["content"]] == logprobs["content"]
    assert (await post(http, logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], ""),
        (None, ""),
    ],
)
async def test_content_forms(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, content: Any, text: str
) -> None:
    await post(http, messages=[{"role": "assistant", "content": content}], add_generation_prompt=False)
    assert tokenizer.decode(client.requests[0].prompt_ids, False) == f"<|bos|>assistant: {text}\n"


async def test_template_options(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    await post(http, chat_template_kwargs={"mood": " :)"})
    assert tokenizer.decode(client.requests[0].prompt_ids, False).endswith("assistant: :)")
    await post(http, reasoning_effort="low", chat_template_kwargs={"mood": "very "})
    assert tokenizer.decode(client.requests[1].prompt_ids, False).endswith("assistant:very low")
    messages = [*ASK["messages"], {"role": "assistant", "content": "I say"}]
    await post(http, messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(client.requests[2].prompt_ids, False).endswith("assistant: I say")


async def test_max_completion_tokens_wins(http: httpx.AsyncClient, client: FakeClient) -> None:
    await post(http, max_tokens=5, max_completion_tokens=7)
    await post(http, max_tokens=5)
    assert [request.params.max_tokens for request in client.requests] == [7, 5]


async def test_fields_that_ask_for_nothing_are_fine(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.script = says([5])
    await post(
        http,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        best_of=1,
        echo=False,
        store=False,
        verbosity="medium",
        unknown_field={"x": 1},
    )
    assert len(client.requests) == 1


async def test_stop_strings(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says(tokenizer.encode("hello world", False))
    assert (await post(http, stop="o w"))["choices"][0]["message"]["content"] == "hell"
    events = await stream(http, stop="o w")
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "hell"
    assert len(client.closed_early) == 2
