"""The official `openai` client against a real server process: sync, async, streaming, many at once."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from .conftest import MODEL_NAME, RunningServer

PROMPT = "import os\nimport sys\n\n\ndef main("


def _greedy(prompt: Any = PROMPT, **options: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}


def test_models(server: RunningServer) -> None:
    models = server.client().models.list().data
    assert [model.id for model in models] == [MODEL_NAME]


def test_ready_line_names_what_is_served(server: RunningServer) -> None:
    for part in (MODEL_NAME, "cpu", "float32", "KV pages", "requests of 4,096 tokens"):
        assert part in server.ready_line


def test_stream_equals_full_text(server: RunningServer) -> None:
    client = server.client()
    full = client.completions.create(**_greedy())
    stream = client.completions.create(**_greedy(), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == full.choices[0].text
    assert chunks[-1].usage == full.usage
    assert full.usage is not None
    assert full.usage.completion_tokens == 12
    assert full.choices[0].finish_reason == "length"


def test_chat_streams_through_the_template(server: RunningServer) -> None:
    client = server.client()
    ask: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "Write a function."}],
        "max_tokens": 16,
        "temperature": 0,
    }
    full = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == full.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == full.choices[0].finish_reason


def test_seeded_sampling_repeats(server: RunningServer) -> None:
    client = server.client()
    texts = [client.completions.create(**_greedy(temperature=1.0, seed=seed)).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_choices_of_one_request_differ_and_are_ordered(server: RunningServer) -> None:
    answer = server.client().completions.create(**_greedy(["a = ", "import "], temperature=1.0, seed=3, n=3))
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 3


def test_logprobs_and_echo(server: RunningServer) -> None:
    answer = server.client().completions.create(**_greedy("def f(x):", echo=True, logprobs=2, max_tokens=3))
    choice = answer.choices[0]
    assert choice.text.startswith("def f(x):")
    assert choice.logprobs is not None
    logprobs, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    assert logprobs is not None and tops is not None
    assert logprobs[0] is None
    assert all(value <= 0 for value in logprobs[1:] if value is not None)
    assert logprobs[-1] == pytest.approx(max(tops[-1].values()))  # greedy took the most likely token


def test_stop_string_is_cut(server: RunningServer) -> None:
    client = server.client()
    text = client.completions.create(**_greedy(max_tokens=40)).choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(**_greedy(max_tokens=40, stop=[stop])).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


def test_multibyte_characters_are_never_split(server: RunningServer) -> None:
    """Drawing evenly from parts of characters gives whole and broken ones: the stream is their decoding."""
    tokenized = httpx.post(f"{server.url}/tokenize", json={"model": MODEL_NAME, "prompt": "éßñ"}).json()
    chunks = server.client().chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "日本語"}],
        max_tokens=150,
        seed=1,
        temperature=8,
        stream=True,
        logprobs=True,
        logit_bias={str(token): 60 for token in tokenized["tokens"]},
    )
    pieces, raw = [], b""
    for chunk in chunks:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            for token in choice.logprobs.content or [] if choice.logprobs else []:
                raw += bytes(token.bytes or [])
    text = "".join(pieces)
    assert text == raw.decode(errors="replace")
    assert len(text.replace("\ufffd", "")) > 20


async def test_concurrent_requests_equal_their_solo_runs(server: RunningServer) -> None:
    """64 mixed requests at temperature 0 in float32: the batch they run in must not matter."""
    asks = [_request(i) for i in range(64)]
    async with server.async_client() as client:
        together = await asyncio.gather(*(client.completions.create(**ask) for ask in asks))
        for ask, answer in list(zip(asks, together, strict=True))[::4]:
            alone = await client.completions.create(**ask)
            assert alone.choices[0].text == answer.choices[0].text


def _request(i: int) -> dict[str, Any]:
    names = ["alpha", "beta", "gamma", "delta"]
    body = "".join(f"{names[(i + j) % 4]}_{j} = {i * j}\n" for j in range(1 + (i * 7) % 40))
    return _greedy(body, max_tokens=4 + i % 13)


async def test_disconnect_gives_the_pages_back(server: RunningServer) -> None:
    async with server.async_client() as client:
        endless = _greedy(max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
        stream = await client.completions.create(**endless)
        await anext(aiter(stream))
        assert await asyncio.to_thread(server.metric, "vllm:num_requests_running") >= 1
        await stream.close()
    await asyncio.to_thread(server.wait_until, lambda: server.metric("quire:kv_pages_used") == 0)


async def test_disconnect_of_a_plain_request_aborts_it(server: RunningServer) -> None:
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ReadTimeout):
            body = _greedy(max_tokens=3000, ignore_eos=True)
            await http.post(f"{server.url}/v1/completions", json=body, timeout=1.0)
    await asyncio.to_thread(server.wait_until, lambda: server.metric("quire:kv_pages_used") == 0, 20)


def test_too_long_prompt_names_both_lengths(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(**_greedy([5] * 5000))
    assert caught.value.code == "context_length_exceeded"
    assert "5000" in str(caught.value).replace(",", "") and "4096" in str(caught.value).replace(",", "")


def test_unknown_model_is_a_404(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="nobody", prompt="x")


BAD_BODIES = [
    b"{",
    b"[]",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "logit_bias": {"a": 1}}',
    b'{"prompt": [1, "a"]}',
    b'{"prompt": [99999999]}',
    b'{"prompt": ""}',
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    b'{"prompt": "' + b"word " * 400_000 + b'"}',
    b'{"prompt": "' + b"\\ud800" + b'"}',
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_bodies_are_4xx_and_the_server_goes_on(server: RunningServer, body: bytes) -> None:
    with_model = body.replace(b'{"prompt"', b'{"model": "quire-mini", "prompt"')
    response = httpx.post(
        f"{server.url}/v1/completions", content=with_model, headers={"content-type": "application/json"}, timeout=60
    )
    assert 400 <= response.status_code < 500, response.text[:300]
    assert response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_pages_are_all_back_at_the_end(server: RunningServer) -> None:
    server.wait_until(lambda: server.metric("quire:kv_pages_used") == 0)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:request_success_total") > 64
