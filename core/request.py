"""What a user asks for: `SamplingParams`, `Grammar` and `Request`, checked here once for HTTP and offline use alike."""

import math
import random
from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from .errors import InvalidRequestError
from .ids import RequestId
from .pruning import PruneParams

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MAX_CACHE_SALT = 256
MAX_PRIORITY = 1000
MAX_TIMEOUT = 86_400.0
"""Seconds."""


def _check_range(name: str, value: float | None, low: float, high: float | None, low_open: bool = False) -> None:
    """Refuse NaN, infinities and values outside [low, high] (or (low, high] with `low_open`)."""
    if value is None:
        return
    bad: Any = not math.isfinite(value) or value < low or (low_open and value == low)
    if bad or (high is not None and value > high):
        span = f"{'>' if low_open else '>='} {low:g}" + ("" if high is None else f" and <= {high:g}")
        raise InvalidRequestError(f"{name} must be {span}, got {value}", param=name)


class SeedSource:
    """Seeds for requests that bring none."""

    def __init__(self, seed: int | None = None) -> None:
        """seed: with it, the requests have the seeds of an earlier run, in the order in which they come."""
        self._random = random.Random(seed)
        self._repeatable = seed is not None

    def settle(self, params: "SamplingParams") -> "tuple[SamplingParams, int]":
        """The parameters, and 64 bits of seed for them.

        Where runs are to be repeatable, a request is treated as if it had asked for its seed: how many tokens are
        drafted follows the clock, and must not then decide what is drawn.
        """
        if params.seed is not None:
            return params, params.seed % 2**64
        seed = self._random.getrandbits(64)
        return (msgspec.structs.replace(params, seed=seed) if self._repeatable else params), seed


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Order of application: penalties, bias, minimum length, grammar, temperature, top-k/p/min-p.

    Raises `InvalidRequestError`, naming the field, when a value is out of range.
    """

    temperature: float = 1.0
    """0 is greedy; at most 100."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose mass reaches this; (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 (or -1) keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one; [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the output; [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output; [-2, 2]."""
    logit_bias: dict[int, float] = {}
    """Token id -> added to its logit; [-100, 100]."""
    seed: int | None = None
    """Makes the request repeatable, alone or in any batch; drawn at random where absent."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, besides the model's own end tokens."""
    max_tokens: int | None = None
    """Most tokens to generate; None means as many as the context holds."""
    min_tokens: int = 0
    """End tokens are masked out until this many tokens are generated."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = None
    """None: none; k: log-probability of each generated token and of the k most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt (the first has none)."""
    n: int = 1
    """Independent completions of one prompt."""

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, -1, None)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("min_tokens", self.min_tokens, 0, None)
        _check_range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        _check_range("n", self.n, 1, MAX_CHOICES)
        _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequestError(f"at most {MAX_STOP_TOKENS} stop tokens are allowed", param="stop_token_ids")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"at most {MAX_LOGIT_BIAS} biased tokens are allowed", param="logit_bias")
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
"""How it was written by who asked."""
GRAMMAR_KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)


MAX_GRAMMAR_SYMBOLS = 20_000
"""Of a grammar as llguidance reads it."""
MAX_GRAMMAR_FUEL = 300_000
"""What reading it may take, as llguidance counts: those that pass are compiled in about a second at most. No plain list
of choices comes near that is short enough to be taken at all, nor any usual schema."""


class Grammar(msgspec.Struct, frozen=True, weakref=True):
    """What an output must be a word of; see docs/structured-outputs.md."""

    kind: GrammarKind
    source: str
    """In llguidance's own format, whatever the kind."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt with its parameters, as the server hands it to the scheduler."""

    id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    seed: int = 0
    """`params.seed`, or what was drawn in its place; 64 bits unsigned."""
    cache_salt: str = ""
    """Only requests of equal salt reuse each other's prefixes, so that nobody can time what others asked."""
    cache_ttl: float = 0.0
    """Seconds for which its prompt's computed blocks stay cached after its end, whatever others need."""
    prune: PruneParams | None = None
    """How its sequences may forget; None: not at all."""
    repeat_ids: tuple[int, ...] = ()
    """Tokens that ask the model to repeat what came before, for a policy that scores by that (KVzip)."""
    priority: int = 0
    """Lower is sooner, within +-`MAX_PRIORITY`; counts under the policy `priority`."""
    tenant: str = ""
    """For whom it is computed: whose share it takes under the policy `fair`, whose outputs teach `sjf`."""
    timeout: float | None = None
    """Seconds from its arrival in the engine process in which it must end; None: no limit."""
    speculate: bool = True
    """Whether its tokens may be drafted; they are the same either way."""
    namespace: str = ""
    """Prefixes are reused only within one: an API key's, where the operator isolates keys."""
    grammar: Grammar | None = None
    """What its outputs are bound to; None: nothing."""
    record: bool = False
    """Whether what the model said at each generated token is told too, as `Recorded`: for a log, not for the user."""

    def __post_init__(self) -> None:
        _check_range("cache_ttl", self.cache_ttl, 0.0, None)
        if len(self.cache_salt) > MAX_CACHE_SALT:
            raise InvalidRequestError(
                f"cache_salt has {len(self.cache_salt):,} characters, at most {MAX_CACHE_SALT} are allowed",
                param="cache_salt",
            )
        _check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_range("timeout", self.timeout, 0.0, MAX_TIMEOUT, low_open=True)

    @staticmethod
    def create(
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seeds: SeedSource,
        *,
        cache_salt: str = "",
        cache_ttl: float = 0.0,
        prune: PruneParams | None = None,
        repeat_ids: Sequence[int] = (),
        priority: int = 0,
        tenant: str = "",
        timeout: float | None = None,
        namespace: str = "",
        speculate: bool = True,
        grammar: Grammar | None = None,
    ) -> "Request":
        """A request with its seed settled: `seeds` gives one where the parameters do not."""
        params, seed = seeds.settle(params)
        return Request(
            id=RequestId(request_id),
            prompt_ids=tuple(prompt_ids),
            params=params,
            seed=seed,
            cache_salt=cache_salt,
            cache_ttl=cache_ttl,
            prune=prune,
            repeat_ids=tuple(repeat_ids),
            priority=priority,
            tenant=tenant,
            timeout=timeout,
            namespace=namespace,
            speculate=speculate,
            grammar=grammar,
        )
