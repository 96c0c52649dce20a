"""Computed prefixes outlast a restart of a real server, whatever the file holds that it finds."""

from pathlib import Path
from typing import Any

import httpx

from .conftest import RunningServer, start_server

PROMPT = "def connect(host, port):\n    timeout_limit = 4817\n    return host, port, timeout_limit\n" * 3


def complete(server: RunningServer) -> tuple[str, int]:
    """The greedy continuation, and how many tokens of the prompt were computed before."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prefixes_outlast_a_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.write_bytes(b"of another program")
    texts, cached = [], []
    for _ in range(2):
        server = start_server("--dtype", "float32", "--max-num-seqs", "2", "--cache-file", str(path))
        text, known = complete(server)
        assert server.stop() == 0
        texts.append(text)
        cached.append(known)
    assert texts[0] == texts[1] and cached[0] == 0 < cached[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["prefixes"]
    assert path.stat().st_mode & 0o777 == 0o600
