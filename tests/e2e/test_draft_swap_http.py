"""A real server whose draft is replaced while it streams, refuses bad ones, and comes back with the new one."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.core.config import embedded_model

from .conftest import MODEL_NAME, RunningServer, start_server

BODY = {"model": MODEL_NAME, "prompt": "def area(width", "temperature": 0.8, "seed": 3, "max_tokens": 150}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    first = shutil.copytree(embedded_model() / "draft", tmp_path_factory.mktemp("first") / "draft")
    options = ["--draft", str(first), "--draft-tokens", "3", "--api-key", "secret"]
    running = start_server("--dtype", "float32", "--max-num-seqs", "8", *options)
    yield running
    assert running.stop() == 0


def replace(server: RunningServer, folder: Path | str) -> httpx.Response:
    return httpx.post(f"{server.url}/draft", json={"draft": str(folder)}, headers=KEY, timeout=120)


def card(server: RunningServer) -> dict[str, Any]:
    (model,) = httpx.get(f"{server.url}/v1/models", headers=KEY).json()["data"]
    draft: dict[str, Any] = model["draft"]
    return draft


def streamed(server: RunningServer, begun: threading.Event | None = None, **more: Any) -> str:
    """The text of a stream; `begun` is set with its first part."""
    body, text = BODY | {"stream": True, "ignore_eos": True} | more, ""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=KEY, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if begun is not None:
                    begun.set()
    return text


def test_life_of_a_draft(server: RunningServer, tmp_path: Path) -> None:
    new = shutil.copytree(embedded_model() / "draft", tmp_path / "new")
    old, alone = card(server), streamed(server, speculate=False)
    begun, told = threading.Event(), list[str]()
    stream = threading.Thread(target=lambda: told.append(streamed(server, begun)))
    stream.start()
    assert begun.wait(60)
    answer = replace(server, new)
    stream.join(120)
    assert told == [alone]
    assert (answer.status_code, answer.json()) == (200, old | {"name": str(new)}) and card(server) == answer.json()

    for bad, why in ((tmp_path / "nothing", "not a folder"), (tmp_path, "config.json")):
        refused = replace(server, bad)
        assert refused.status_code == 400 and why in refused.json()["error"]["message"]
    assert httpx.post(f"{server.url}/draft", json={"draft": str(new)}).status_code == 401
    assert card(server)["name"] == str(new)
    drafted = httpx.get(f"{server.url}/metrics", headers=KEY).text
    assert f'name="{new}"' in drafted and old["name"] not in drafted

    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    assert server.engine_pid() != engine and card(server)["name"] == str(new)
    assert streamed(server) == alone


def test_ngrams_take_up_a_model_and_give_it_back(tmp_path: Path) -> None:
    new = shutil.copytree(embedded_model() / "draft", tmp_path / "new")
    server = start_server("--dtype", "float32", "--max-num-seqs", "8", "--draft", "ngram", "--api-key", "secret")
    try:
        ngrams, alone = card(server), streamed(server, speculate=False)
        assert (ngrams["method"], streamed(server)) == ("ngram", alone)
        both = replace(server, new).json()
        assert both == card(server) and (both["method"], both["name"]) == ("hybrid", f"ngram+{new}")
        assert both["bytes"] > ngrams["bytes"] and streamed(server) == alone

        engine = server.engine_pid()
        os.kill(engine, signal.SIGKILL)
        server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert card(server) == both and streamed(server) == alone

        assert replace(server, "ngram").json() == ngrams == card(server)
        assert streamed(server) == alone
    finally:
        assert server.stop() == 0
