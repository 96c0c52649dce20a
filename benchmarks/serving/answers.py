"""What a raw answer says: when its text came, how many tokens it has, or why there is none."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .client import Exchange


@dataclass(frozen=True, slots=True)
class Answer:
    """A completed stream; times on `time.perf_counter`, in seconds."""

    started: float
    """When the request was sent."""
    arrivals: tuple[float, ...]
    """When text came, which may be of several tokens; never empty."""
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.started

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.arrivals[-1] - self.started

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: between texts that follow each other."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first one."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a whole answer."""

    reason: str


def read(exchange: Exchange) -> Answer | Failure:
    """Decode a stream of chat completions. A server that reports no usage is counted by the texts it sent."""
    if exchange.failure is not None:
        return Failure(exchange.failure)
    if exchange.status != 200:
        said = b"".join(piece for _, piece in exchange.pieces)
        return Failure(f"status {exchange.status}: {said[:200].decode(errors='replace')}")
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    done = False
    for when, data in _events(exchange.pieces):
        if data == b"[DONE]":
            done = True
            continue
        try:
            chunk = json.loads(data)
        except ValueError:
            return Failure(f"an event is not JSON: {data[:100]!r}")
        if "error" in chunk:
            return Failure(f"the stream broke off: {json.dumps(chunk['error'])[:200]}")
        if any(_text(choice) for choice in chunk.get("choices") or ()):
            arrivals.append(when)
        usage = chunk.get("usage") or usage
    if not done or not arrivals:
        return Failure("the stream ended without its [DONE]" if not done else "the answer has no text")
    tokens = usage.get("completion_tokens", len(arrivals))
    return Answer(exchange.started, tuple(arrivals), usage.get("prompt_tokens", 0), tokens)


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(delta.get("content") or delta.get("reasoning_content") or "")


def _events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Server-sent events with the time at which each was complete, however the body was cut into pieces."""
    rest = b""
    for when, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip()
