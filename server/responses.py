"""The bodies of the two OpenAI endpoints, whole and as chunks, made from deltas."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.messages import FinishReason
from ..core.pruning import CacheUse
from .generation import Delta, ScoredToken
from .text import Tokenizer

MIN_LOGPROB = -9999.0
"""What OpenAI sends for a probability of zero; JSON knows no infinity."""


@dataclass(slots=True)
class Usage:
    """Token counts of a response."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    pinned_tokens: int = 0
    """Prompt tokens kept for the `cache_ttl` that was asked for."""
    policy: str | None = None
    """By which its sequences are pruned."""
    caches: dict[int, CacheUse] = field(default_factory=dict)
    """Of each choice, as last heard."""

    def add(self, delta: Delta) -> None:
        """Count what a delta brought."""
        self.completion_tokens += delta.num_tokens
        self.cached_tokens += delta.cached_tokens
        self.pinned_tokens += delta.pinned_tokens
        if delta.cache is not None:
            self.caches[delta.index] = delta.cache

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`; where something was pruned, entries per head too, summed over the choices."""
        details = {"cached_tokens": self.cached_tokens}
        if self.pinned_tokens:
            details["pinned_tokens"] = self.pinned_tokens
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
        }
        if self.policy is None or not self.caches:
            return body
        kept = round(sum(cache.kept for cache in self.caches.values()), 1)
        dropped = round(sum(cache.dropped for cache in self.caches.values()), 1)
        return body | {"kv_cache": {"policy": self.policy, "kept_entries": kept, "dropped_entries": dropped}}


@dataclass(slots=True)
class WholeChoice:
    """All deltas of one choice, joined."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True, slots=True)
class Heading:
    """What all chunks of a response repeat."""

    id: str
    model: str
    created: int
    """Unix time in seconds."""
    logprobs: bool
    """Whether log-probabilities were asked for."""


class ResponseFormat(Protocol):
    """How deltas look in one endpoint's bodies."""

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before all others."""
        ...

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks of one delta."""
        ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, if the usage was asked for."""
        ...

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The one body of a response that is not streamed."""
        ...


class CompletionFormat:
    """`/v1/completions`."""

    def __init__(self, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """None: the first chunk has text."""
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """At most one."""
        if not (delta.text or delta.tokens or delta.finish_reason):
            return []
        choice = self._choice(delta.index, delta.text, delta.tokens, delta.finish_reason)
        return [self._body([choice])]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """No choices."""
        return {**self._body([]), "usage": usage.body()}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The whole response."""
        bodies = [self._choice(c.index, "".join(c.texts), c.tokens, c.finish_reason) for c in choices]
        return {**self._body(bodies), "usage": usage.body()}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        heading = self._heading
        return {
            "id": heading.id,
            "object": "text_completion",
            "created": heading.created,
            "model": heading.model,
            "choices": choices,
        }

    def _choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], reason: FinishReason | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if self._heading.logprobs else None
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """OpenAI's four parallel lists; null in a chunk that brings no token."""
        if not tokens:
            return None
        name = self._tokenizer.token_text
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [token.logprob and _finite(token.logprob.logprob) for token in tokens],
            "tokens": [name(token.token_id) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The most likely tokens, and the token itself if it is not among them."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in [*token.logprob.top, (token.token_id, token.logprob.logprob)]:
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return top


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Each choice says first who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, None, None) for index in range(num_choices)]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Text and the finish reason come in chunks of their own."""
        bodies: list[dict[str, Any]] = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens) if delta.tokens else None
            bodies.append(self._chunk(delta.index, {"content": delta.text}, logprobs, None))
        if delta.finish_reason:
            bodies.append(self._chunk(delta.index, {}, None, delta.finish_reason))
        return bodies

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """No choices."""
        return {**self._body("chat.completion.chunk", []), "usage": usage.body()}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The whole response."""
        bodies = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": self._logprobs(choice.tokens) if self._heading.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._body("chat.completion", bodies), "usage": usage.body()}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        heading = self._heading
        return {
            "id": heading.id,
            "object": kind,
            "created": heading.created,
            "model": heading.model,
            "choices": choices,
        }

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._body("chat.completion.chunk", [choice])

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for token in tokens:
            assert token.logprob is not None, "only an echoed prompt has tokens without, and chat does not echo"
            entry = self._token(token.token_id, token.logprob.logprob)
            entry["top_logprobs"] = [self._token(*top) for top in token.logprob.top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
