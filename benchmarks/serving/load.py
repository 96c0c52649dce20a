"""The load: prompts of a set length, and clients that send them in a closed or an open loop."""

import argparse
import asyncio
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import Connection, Exchange, Server

PATH = "/v1/chat/completions"
PROBE_WORDS = (50, 450)
"""Of the prompts that tell how many tokens the server makes of a word."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of every request, in tokens."""

    input: int
    """The whole prompt, the chat template's part included; nearly, for it is made of words."""
    output: int
    prefix: int = 0
    """What of the prompt all requests share."""
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: in a closed or in an open loop."""

    concurrency: int | None = None
    """So many clients, each of which waits for its answer before it asks again."""
    rate: float = 0.0
    """Requests per second, at random times (Poisson), however many are open."""

    @property
    def title(self) -> str:
        """For the table."""
        if self.concurrency is None:
            return f"{self.rate:g} requests/s"
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a server counts a prompt of words: `base + per_word * words` tokens."""

    base: float
    per_word: float


class Prompts:
    """Requests of random words, so that no prefix cache has more of them than the prefix that they share."""

    def __init__(self, server: Server, shape: Shape, lengths: Lengths, seed: int) -> None:
        self._server = server
        self._shape = shape
        self._random = random.Random(seed)
        shared = round(shape.prefix / lengths.per_word)
        self._own = max(1, round((shape.input - lengths.base) / lengths.per_word) - shared)
        self._prefix = self._random.choices(WORDS, k=shared)

    def take(self) -> bytes:
        """The next request: a streamed chat completion, past any end token where the server can be told so."""
        words = [*self._prefix, *self._random.choices(WORDS, k=self._own)]
        body = question(self._server, words) | {
            "max_tokens": self._shape.output,
            "temperature": self._shape.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self._server.request(PATH, body)


def question(server: Server, words: list[str]) -> dict[str, Any]:
    """What every request says."""
    return {"model": server.model, "messages": [{"role": "user", "content": " ".join(words)}]}


async def measured_lengths(server: Server) -> Lengths:
    """Ask the server, which alone knows its tokenizer and template. Raises `OSError`."""
    tokens = []
    for count in PROBE_WORDS:
        words = random.Random(count).choices(WORDS, k=count)
        answer = await server.fetch(PATH, question(server, words) | {"max_tokens": 1})
        tokens.append(answer["usage"]["prompt_tokens"])
    per_word = (tokens[1] - tokens[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    return Lengths(tokens[0] - per_word * PROBE_WORDS[0], per_word)


async def run(server: Server, load: Load, prompts: Prompts, seconds: float) -> list[Exchange]:
    """All exchanges of a load that lasts so long; those begun by then are waited for. Raises `OSError`."""
    clients = _Clients(server, prompts.take)
    if load.concurrency is not None:
        await clients.closed(load.concurrency, seconds)
    else:
        await clients.open(load.rate, seconds)
    return clients.exchanges


class _Clients:
    """Their connections, and what came over them."""

    def __init__(self, server: Server, take: Callable[[], bytes]) -> None:
        self.exchanges: list[Exchange] = []
        self._server = server
        self._take = take
        self._idle: list[Connection] = []

    async def closed(self, clients: int, seconds: float) -> None:
        """Each client asks again as soon as it has its answer."""
        deadline = time.perf_counter() + seconds

        async def client() -> None:
            await self._ask()
            while time.perf_counter() < deadline:
                await self._ask()

        await self._all([client() for _ in range(clients)])

    async def open(self, rate: float, seconds: float) -> None:
        """Requests come as if their senders knew nothing of each other."""
        chance = random.Random(0)
        when, arrivals = chance.expovariate(rate), list[float]()
        while when < seconds or not arrivals:
            arrivals.append(when)
            when += chance.expovariate(rate)

        async def arrival(after: float) -> None:
            await asyncio.sleep(after)
            await self._ask()

        await self._all([arrival(after) for after in arrivals])

    async def _all(self, clients: list[Any]) -> None:
        await asyncio.gather(*clients)
        for connection in self._idle:
            connection.close()

    async def _ask(self) -> None:
        while self._idle and not self._idle[-1].usable:
            self._idle.pop()
        exchange = Exchange(time.perf_counter())
        self.exchanges.append(exchange)
        request = self._take()
        try:
            connection = self._idle.pop() if self._idle else await self._server.connect()
        except OSError as error:
            exchange.failure = f"no connection: {error}"
            return
        await connection.ask(exchange, request)
        self._idle.append(connection)


WORDS = sorted(set(re.findall(r"\b[a-z]{3,10}\b", Path(argparse.__file__).read_text())))
"""Of a source of the standard library: the same ones for all who have this version of Python."""
