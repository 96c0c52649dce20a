"""Timeouts, tenants and isolation through a real server: errors are typed, pages come back, others go on."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .conftest import RunningServer, start_server

PROMPT = "def connect(host, port):\n    timeout_limit = 4817\n    return host, port, timeout_limit\n" * 3


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One sequence at a time, so that a second one waits; two tenants."""
    limits = ["--max-num-seqs", "1", "--queue-timeout", "0.1", "--policy", "priority", "--max-itl-ms", "50"]
    running = start_server(*limits, "--api-key", "a=one", "--api-key", "two", "--isolate-keys")
    yield running
    assert running.stop() == 0


def complete(server: RunningServer, key: str = "one", **fields: Any) -> httpx.Response:
    """A greedy completion that does not stop by chance."""
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)


def pages_used(server: RunningServer) -> float:
    """Pages of running sequences, as /metrics has it."""
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer two"}).text
    return float(next(line for line in text.splitlines() if line.startswith("quire:kv_pages_used{")).rsplit(" ", 1)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_timeout_ends_with_the_error_and_gives_its_pages_back(
    server: RunningServer, stream: bool
) -> None:
    response = complete(server, max_tokens=3500, timeout=0.4, stream=stream, n=1 if stream else 2)
    if stream:
        assert response.status_code == 200 and '"code":"request_timeout"' in response.text.splitlines()[-2]
    else:
        assert response.status_code == 504 and response.json()["error"]["param"] == "timeout"
    server.wait_until(lambda: pages_used(server) == 0)
    assert complete(server).status_code == 200


def test_a_request_that_does_not_start_in_time_ends_while_another_goes_on(server: RunningServer) -> None:
    answers: list[httpx.Response] = []
    long = threading.Thread(target=lambda: answers.append(complete(server, max_tokens=200, speculate=False)))
    long.start()
    server.wait_until(lambda: pages_used(server) > 0)
    refused = complete(server, key="two", priority=5)
    long.join()
    assert refused.status_code == 504 and "0.1 s in the queue" in refused.json()["error"]["message"]
    assert answers[0].json()["usage"]["completion_tokens"] == 200


def test_prefixes_are_not_shared_between_keys(server: RunningServer) -> None:
    def cached(key: str) -> int:
        usage = complete(server, key=key, prompt="# isolation\n" + PROMPT).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("one"), cached("two")] == [0, 0]
    assert cached("one") > 0 and cached("two") > 0
