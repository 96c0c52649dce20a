"""The HTTP benchmark: what it reads from streams, what it makes of them, and that no failure is lost."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import peers
from benchmarks.serving.answers import Answer, Failure, read
from benchmarks.serving.client import Exchange, Server
from benchmarks.serving.load import Lengths, Load, Prompts, Shape, measured_lengths, run
from benchmarks.serving.results import Spent, parse_limits, summary
from benchmarks.serving.servers import ServerFailed, ServerProcess, free_port


def chunk(text: str | None, **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = chunk(None, usage={"prompt_tokens": 7, "completion_tokens": 5})


def exchange(*pieces: tuple[float, bytes], status: int = 200) -> Exchange:
    return Exchange(1.0, status, list(pieces))


def test_text_counts_when_its_event_is_complete() -> None:
    """An opening without text is no first token, and a cut event arrives with its end."""
    cut = chunk("bc")
    answer = read(
        exchange((1.5, chunk("")), (2.0, chunk("a") + cut[:9]), (2.5, cut[9:]), (3.0, chunk("d")), (3.1, USAGE + DONE))
    )
    assert isinstance(answer, Answer)
    assert (answer.arrivals, answer.prompt_tokens, answer.output_tokens) == ((2.0, 2.5, 3.0), 7, 5)
    assert (answer.ttft, answer.e2el, answer.itl, answer.tpot) == (1.0, 2.0, [0.5, 0.5], 0.25)
    uncounted = read(exchange((2.0, chunk("a")), (3.0, chunk("b") + DONE)))
    assert isinstance(uncounted, Answer) and uncounted.output_tokens == 2


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (exchange((2.0, b'{"error": "busy"}'), status=429), "status 429.*busy"),
        (exchange((2.0, chunk("a"))), "without its"),
        (exchange((2.0, DONE)), "no text"),
        (exchange((2.0, chunk("a")), (3.0, b'data: {"error": {"message": "died"}}\n\n')), "broke off.*died"),
        (exchange((2.0, b"data: {\n\n")), "not JSON"),
        (Exchange(1.0, failure="gone"), "gone"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure(broken: Exchange, said: str) -> None:
    answer = read(broken)
    assert isinstance(answer, Failure)
    assert re.search(said, answer.reason)


def test_figures_and_goodput() -> None:
    quick = Answer(0.0, (0.1, 0.2, 0.3), prompt_tokens=10, output_tokens=3)
    slow = Answer(1.0, (1.5, 1.6, 2.0), prompt_tokens=20, output_tokens=5)
    spent = Spent(2.0, client_cores=0.1, server_cores=1.5)
    figures = summary([quick, Failure("x"), slow], spent, {"ttft": 200.0, "itl": 200.0})
    expected = {
        "completed": 2, "failed": 1, "total_input_tokens": 30, "total_output_tokens": 8, "request_throughput": 1.0,
        "output_throughput": 4.0, "total_token_throughput": 19.0, "request_goodput": 0.5, "mean_ttft_ms": 300.0,
        "median_itl_ms": 100.0, "p99_e2el_ms": 993.0, "median_tpot_ms": 112.5, "server_cores": 1.5,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    # Each limit counts, and one late token is enough.
    for limit, good in (("ttft:99", 0), ("ttft:101", 0.5), ("itl:399", 0.5), ("itl:401", 1.0), ("e2el:1000", 1.0)):
        assert summary([quick, slow], spent, parse_limits([limit]))["request_goodput"] == good
    assert "mean_ttft_ms" not in summary([Failure("x")], spent, {})
    for wrong in ("ttft", "ttft:soon", "speed:3"):
        with pytest.raises(ValueError, match=wrong):
            parse_limits([wrong])


def test_ratios_to_a_peer_are_of_one_round_and_say_who_is_faster() -> None:
    def figures(rate: float, milliseconds: float) -> dict[str, dict[str, float]]:
        return {"2 clients": {name: rate if name == "output_throughput" else milliseconds for name in peers.ROWS}}

    rounds = [{"quire": figures(300.0 * k, 4.0), "vllm": figures(100.0 * k, 2.0)} for k in (1, 2, 3)]
    rows = peers.table(rounds, [Load(concurrency=2)], ["quire", "vllm"]).splitlines()
    assert rows[2] == "| 2 clients: output tokens/s | 600 | 200 (3.00x, 3.00 to 3.00) |"
    assert rows[3].endswith("| 4.0 | 2.0 (0.50x, 0.50 to 0.50) |")


class FakeServer:
    """Counts a token per word and five for its template; every third stream is refused, every fifth breaks off."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.connections = self.streams = self.open = self.most_open = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.asked.append(body)
                tokens = 5 + len(body["messages"][0]["content"].split())
                if not body.get("stream"):
                    self._whole(writer, 200, {"usage": {"prompt_tokens": tokens}})
                elif not await self._stream(writer):
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter) -> bool:
        self.streams += 1
        if self.streams % 3 == 0:
            self._whole(writer, 503, {"error": "busy"})
            return True
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        number = self.streams
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for text in (chunk("a"), chunk("b"), DONE):
            writer.write(b"%x\r\n%s\r\n" % (len(text), text))
            await asyncio.sleep(0.01)
        self.open -= 1
        if number % 5 == 0:
            return False
        writer.write(b"0\r\n\r\n")
        return True

    def _whole(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))


@pytest.mark.parametrize(("load", "seconds"), [(Load(concurrency=3), 0.3), (Load(rate=60.0), 0.5)])
async def test_loads_keep_their_promise_and_count_failures(load: Load, seconds: float) -> None:
    fake = FakeServer()
    async with await asyncio.start_server(fake, "127.0.0.1", 0) as listening:
        server = Server(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "m")
        lengths = await measured_lengths(server)
        assert (lengths.base, lengths.per_word) == (5.0, 1.0)
        del fake.asked[:]
        prompts = Prompts(server, Shape(input=40, output=9, prefix=10), lengths, seed=1)
        fake.connections = 0
        exchanges = await run(server, load, prompts, seconds)
    texts = [body["messages"][0]["content"].split() for body in fake.asked]
    assert len(exchanges) == len(texts) > 10
    assert {len(text) for text in texts} == {35} and len({tuple(text[:10]) for text in texts}) == 1
    assert len({tuple(text) for text in texts}) == len(texts)
    assert all(body["max_tokens"] == 9 and body["ignore_eos"] for body in fake.asked)
    refused, broken = len(texts) // 3, sum(k % 5 == 0 and k % 3 != 0 for k in range(1, len(texts) + 1))
    answers = [read(one) for one in exchanges]
    assert sum(isinstance(answer, Failure) for answer in answers) == refused + broken
    assert fake.connections < len(texts)  # they are kept alive
    if load.concurrency:
        assert fake.most_open <= load.concurrency


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    server = Server(f"http://127.0.0.1:{free_port()}", "m")
    prompts = Prompts(server, Shape(10, 1), Lengths(0, 1), seed=1)
    (one,) = await run(server, Load(concurrency=1), prompts, 0)
    assert isinstance(answer := read(one), Failure) and "no connection" in answer.reason


def test_a_server_process_runs_in_its_turn_only(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    process = ServerProcess(command, port, "/", tmp_path / "log")
    state = Path(f"/proc/{process._process.pid}/stat")
    with process.awake():
        assert process.cpu_seconds() > 0
        assert state.read_text().rsplit(") ")[1][0] != "T"
    process.end()
    assert not state.exists()
    with pytest.raises(ServerFailed, match="exit code 3"):
        ServerProcess([sys.executable, "-c", "raise SystemExit(3)"], port, "/", tmp_path / "log")
