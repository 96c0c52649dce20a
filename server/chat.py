"""`quire chat`: a small terminal chat that streams from any OpenAI-style server."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console

from ..core.errors import ConfigError, QuireError


class Conversation:
    """The messages so far and the server they go to."""

    def __init__(
        self, url: str, model: str | None, api_key: str | None, system: str | None, temperature: float, max_tokens: int
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1") + "/v1/"
        self._http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(600, connect=5))
        self._options = {"temperature": temperature, "max_tokens": max_tokens, "stream": True}
        self._system = system
        self.model = model or self._first_model()
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str) -> Iterator[str]:
        """Send one message; yields the answer piece by piece and remembers it. On an error nothing is remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, **self._options}
        answer = ""
        with self._guarded(), self._http.stream("POST", "chat/completions", json=body) as response:
            _check(response)
            for piece in _pieces(response.iter_lines()):
                answer += piece
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _first_model(self) -> str:
        with self._guarded():
            response = self._http.get("models")
            _check(response)
            return str(response.json()["data"][0]["id"])

    def _guarded(self) -> "_HttpErrors":
        return _HttpErrors(str(self._http.base_url))


class _HttpErrors:
    """Turns connection trouble into one clear line."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            raise ConfigError(f"not a server address: {self._url}") from error
        if isinstance(error, httpx.HTTPError):
            raise ConfigError(f"no answer from {self._url}: {error}") from error
        if isinstance(error, ValueError | KeyError | IndexError):
            raise ConfigError(f"{self._url} does not answer like an OpenAI-style server") from error


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise QuireError(f"the server says {response.status_code}: {message}")


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text deltas of an SSE stream of chat completion chunks."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise QuireError(f"the server says: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield text


def run_chat(conversation: Conversation) -> None:
    """Read lines, print streamed answers, until the end of input or `/exit`."""
    console = Console(highlight=False)
    console.print(f"Talking to [bold]{conversation.model}[/]. /clear forgets, /exit (or Ctrl-D) ends.")
    while (text := _ask(console)) is not None:
        if text == "/clear":
            conversation.clear()
        elif text:
            _answer(conversation, console, text)


def _ask(console: Console) -> str | None:
    try:
        text = console.input("[bold cyan]you>[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/exit", "/quit") else text


def _answer(conversation: Conversation, console: Console, text: str) -> None:
    try:
        for piece in conversation.say(text):
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]", end="")
    except QuireError as error:
        print(f"error: {error.message}", end="", file=sys.stderr)
    console.print()
