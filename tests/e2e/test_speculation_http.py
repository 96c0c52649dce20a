"""A real server that drafts: streams, metrics and model card, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .conftest import MODEL_NAME, RunningServer, start_server

CODE = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return width * "
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 61},
    "drawn": {"temperature": 0.7, "seed": 3, "n": 2, "max_tokens": 30},
    # The answer repeats itself: the end comes after some of that, so that there were drafts.
    "stopped": {"temperature": 0, "max_tokens": 61, "stop": ["last):\n    return (most recent call last):", "\n\n"]},
    "scored": {"temperature": 0, "max_tokens": 20, "logprobs": 2},
    "pruned": {
        "temperature": 0,
        "max_tokens": 61,
        "prune": {"policy": "snapkv", "keep": 0.5, "floor": 16, "window": 8},
    },
}


@pytest.fixture(scope="module")
def drafting() -> Iterator[RunningServer]:
    running = start_server("--dtype", "float32", "--max-num-seqs", "8", "--draft", "ngram", "--draft-tokens", "4")
    complete(running, max_tokens=4)  # metrics begin with the first report of a step
    yield running
    assert running.stop() == 0


def complete(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {"model": MODEL_NAME, "prompt": CODE, "ignore_eos": True} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def answer(server: RunningServer, stream: bool, **fields: Any) -> tuple[dict[int, list[Any]], dict[str, Any]]:
    """Text, finish reason and log-probabilities of each choice, and the usage."""
    if stream:
        fields |= {"stream_options": {"include_usage": True}}
    response = complete(server, stream=stream, **fields)
    assert response.status_code == 200, response.text
    if not stream:
        bodies = [response.json()]
    else:
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        lines = [line for line in lines if line]
        assert lines.pop() == "[DONE]"
        bodies = [json.loads(line) for line in lines]
    told: dict[int, list[Any]] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        mine = told.setdefault(choice["index"], ["", None, []])
        mine[0] += choice["text"]
        mine[1] = choice["finish_reason"] or mine[1]
        mine[2] += (choice["logprobs"] or {}).get("token_logprobs", [])
    usage = bodies[-1]["usage"]
    return told, {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same(drafting: RunningServer, case: str, stream: bool) -> None:
    drafts = "vllm:spec_decode_num_draft_tokens_total"
    # One whose text was stopped may go on for a step, until the engine hears of it.
    drafting.wait_until(lambda: drafting.metric("vllm:num_requests_running") == 0)
    before = drafting.metric(drafts)
    without, usage = answer(drafting, stream, speculate=False, **CASES[case])
    assert drafting.metric(drafts) == before
    told, same = answer(drafting, stream, **CASES[case])
    assert drafting.metric(drafts) > before
    assert same == usage and told.keys() == without.keys()
    for index, (text, reason, logprobs) in told.items():
        assert [text, reason] == without[index][:2] and reason == ("stop" if case == "stopped" else "length")
        assert logprobs == pytest.approx(without[index][2], abs=1e-3) and bool(logprobs) == (case == "scored")


def test_what_the_server_says_of_it(drafting: RunningServer) -> None:
    complete(drafting, temperature=0, max_tokens=40)
    (card,) = httpx.get(f"{drafting.url}/v1/models").json()["data"]
    held = card["draft"].pop("bytes")
    assert card["draft"] == {"method": "ngram", "name": "ngram", "max_tokens": 4, "fixed": True}
    assert held == drafting.metric("quire:drafter_bytes") == 0, "indices come with sequences"
    assert "ngram" in drafting.ready_line
    counts = {
        name: drafting.metric(f"vllm:spec_decode_num_{name}_total")
        for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    }
    assert 0 < counts["accepted_tokens"] == counts["accepted_tokens_per_pos"] <= counts["draft_tokens"]
    assert counts["drafts"] <= counts["draft_tokens"] <= 4 * counts["drafts"]
    assert drafting.metric("quire:draft_lengths_total") >= counts["drafts"]


@pytest.mark.parametrize("value", ["no", 3, []])
def test_bad_values_are_refused(drafting: RunningServer, value: Any) -> None:
    response = complete(drafting, speculate=value, max_tokens=2)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == "speculate"


@pytest.mark.parametrize("draft", ["layerskip:99", "./no/such/draft"])
def test_a_server_that_cannot_draft_so_does_not_start(draft: str) -> None:
    command = [sys.executable, "-m", "quire.server", "serve", "--port", "0", "--draft", draft]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0 and not result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and draft.removeprefix("./") in line
