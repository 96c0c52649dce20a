"""Life of the processes: the engine dies and comes back, bad starts end with one line, the end is orderly."""

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from quire.core.config import embedded_model

from .conftest import MODEL_NAME, RunningServer, start_server


def _quire(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire.server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


async def test_engine_death_fails_open_requests_and_it_comes_back() -> None:
    server = await asyncio.to_thread(start_server, "--max-num-seqs", "4")
    try:
        async with server.async_client() as client:
            stream = await client.completions.create(
                model=MODEL_NAME, prompt="x = ", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            first = server.engine_pid()
            os.kill(first, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="engine"):
                async for _ in stream:
                    pass
            await asyncio.to_thread(server.wait_until, lambda: _status(server, "/ready") == 200)
            assert server.engine_pid() != first
            again = await client.completions.create(model=MODEL_NAME, prompt="x = ", max_tokens=3)
            assert again.usage is not None and again.usage.completion_tokens > 0
    finally:
        code = await asyncio.to_thread(server.stop)
    assert code == 0


def _status(server: RunningServer, route: str) -> int:
    return httpx.get(server.url + route).status_code


def test_engine_ends_when_the_server_is_killed() -> None:
    server = start_server("--max-num-seqs", "4")
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{engine}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{engine}").exists()


def test_api_key_guards_the_api() -> None:
    server = start_server("--api-key", "secret", "--max-num-seqs", "4")
    try:
        assert _status(server, "/v1/models") == 401
        assert _status(server, "/health") == 200
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    finally:
        server.stop()


def test_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = _quire("serve", "--port", str(taken.getsockname()[1]))
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot listen on 127.0.0.1")


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _pickle_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["NobodyKnowsForCausalLM"], "model_type": "nobody_knows"}
    (folder / "config.json").write_text(json.dumps(config))


def _missing_tensor(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header["unexpected." + name] = header.pop(name)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


BREAKAGES = [_truncate, _pickle_only, _unknown_architecture, _missing_tensor, _broken_config]


@pytest.mark.parametrize("break_it", BREAKAGES)
def test_broken_checkpoint_is_one_clear_line(break_it: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    break_it(folder)
    result = _quire("serve", str(folder), "--port", "0")
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kv-memory", "1KiB"),
        ("--kv-memory", "lots"),
        ("--page-size", "0"),
        ("--dtype", "float12"),
        ("--max-num-seqs", "0"),
        ("--device", "cuda"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: tuple[str, ...]) -> None:
    result = _quire("serve", "--port", "0", *arguments)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.strip()


def test_missing_model_folder() -> None:
    result = _quire("serve", "./no/such/model", "--port", "0")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "no/such/model" in result.stderr


def test_version_and_help() -> None:
    assert _quire("--version").stdout.startswith("quire 0.")
    assert "QUIRE_KV_MEMORY" in _quire("serve", "--help").stdout


def test_offline_completion() -> None:
    result = _quire("complete", "def main(", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


async def test_sigterm_refuses_new_work_and_finishes_open_requests() -> None:
    server = await asyncio.to_thread(start_server, "--max-num-seqs", "4")
    async with server.async_client() as client, httpx.AsyncClient(base_url=server.url) as probe:
        stream = await client.completions.create(
            model=MODEL_NAME, prompt="x = ", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = aiter(stream)
        await anext(chunks)
        assert (await probe.get("/ready")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert (await probe.get("/ready")).json() == {"status": "draining"}
        refused = await probe.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        last = [chunk async for chunk in chunks][-1]
        assert last.choices[0].finish_reason == "length"
    assert await asyncio.to_thread(server.process.wait, 30) == 0
