"""Synthetic traffic with the statistics of published traces.

Lengths are log-normal, each with its own median and spread. Arrivals follow a Gamma renewal process: with a
coefficient of variation of 1 it is Poisson, above it is bursty, as BurstGPT (Wang et al. 2024, arXiv:2401.17644) found
real services to be. Conversations take several turns, each with all that was said before as its prompt.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

EOS = 0
FILLER = 7
"""What the simulated model says until it ends."""
_POOL = 1 << 18
_MEAN_TURNS = 2.5
_MEAN_PAUSE = 10.0
"""Seconds that a user reads and thinks between turns."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts (of a turn's own words) and outputs: medians and spreads (sigma of the logarithm)."""

    prompt: float
    prompt_sigma: float
    output: float
    output_sigma: float
    mean_turns: float = 1.0

    @property
    def mean_output(self) -> float:
        """Tokens."""
        return self.output * math.exp(self.output_sigma**2 / 2)


WORKLOADS = {
    # Azure LLM inference traces of 2023 (Patel et al., Splitwise, ISCA 2024, section III): medians 1,020 and 129
    # tokens for conversation, 1,500 and 13 for coding; the spreads give the published means (1,155 and 211; 2,048, 28).
    "conversation": Lengths(1020, 0.50, 129, 0.99),
    "coding": Lengths(1500, 0.79, 13, 1.24),
    # ShareGPT: means 161 and 338 tokens (Kwon et al., SOSP 2023, figure 11); the spreads are assumed, so are the turns.
    "chat": Lengths(88, 1.10, 205, 1.00, mean_turns=_MEAN_TURNS),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """What arrives. Everything follows from the seed."""

    lengths: Lengths
    requests: int
    """Of all tenants together."""
    rate: float
    """Requests per second of all tenants together; infinite: all conversations begin at once."""
    variation: float = 1.0
    """Coefficient of variation of the times between arrivals; 1 is Poisson."""
    tenants: int = 1
    flood: float = 1.0
    """How many times as much as any other tenant the first one asks for."""
    shared: int = 0
    """Tokens of each tenant's system prompt."""
    max_model_len: int = 32_768
    vocab_size: int = 32_000
    seed: int = 0
    only: int | None = None
    """Let this tenant's requests arrive alone."""

    def quota(self, tenant: int) -> int:
        """Requests of a tenant."""
        return max(1, round(self.requests * self._share(tenant)))

    def _share(self, tenant: int) -> float:
        return (self.flood if tenant == 0 else 1.0) / (self.flood + self.tenants - 1)

    def conversations(self, tenant: int) -> Iterator["Turn"]:
        """First turns of a tenant's conversations, in the order of arrival; their turns add up to its quota."""
        rng = random.Random(f"{self.seed}/{tenant}")
        system = _words(rng, self.shared, self.vocab_size)
        turns_per_second = self.rate * self._share(tenant)
        shape, now, missing = 1 / self.variation**2, 0.0, self.quota(tenant)
        while missing > 0:
            turns = min(missing, _geometric(rng, self.lengths.mean_turns))
            missing -= turns
            own = random.Random(rng.getrandbits(64))
            yield Turn(tenant, now, Conversation(own, system, turns, self))
            if math.isfinite(turns_per_second):
                mean = self.lengths.mean_turns / turns_per_second
                now += rng.gammavariate(shape, mean / shape)


@dataclass(slots=True)
class Conversation:
    """A user's turns, one after another; the random numbers are its own, whatever happens around it."""

    rng: random.Random
    context: tuple[int, ...]
    turns_left: int
    traffic: Traffic
    prompt: tuple[int, ...] = ()
    output: int = 0

    def speak(self) -> None:
        """Draw the next turn: `prompt` and tokens of `output`."""
        lengths, room = self.traffic.lengths, self.traffic.max_model_len
        words = self._draw(lengths.prompt, lengths.prompt_sigma)
        self.output = min(self._draw(lengths.output, lengths.output_sigma), room // 4)
        longest = room - self.output - 1
        if len(self.context) + words > longest:  # the oldest words are forgotten
            words = min(words, longest // 2)
            self.context = self.context[len(self.context) + words - longest :]
        self.prompt = self.context + _words(self.rng, words, self.traffic.vocab_size)
        self.turns_left -= 1

    def answered(self) -> float:
        """Take in the answer; seconds until the next turn."""
        self.context = (*self.prompt, *itertools.repeat(FILLER, self.output - 1), EOS)
        self.prompt = ()
        return self.rng.expovariate(1 / _MEAN_PAUSE)

    def _draw(self, median: float, sigma: float) -> int:
        return max(1, round(self.rng.lognormvariate(math.log(median), sigma)))


@dataclass(order=True, slots=True)
class Turn:
    """One request to come."""

    tenant: int = field(compare=False)
    time: float
    """Seconds; when the user sends it."""
    conversation: Conversation = field(compare=False)


class Arrivals:
    """Turns by time: of all tenants' new conversations, and those that come back (next turns, and refused ones)."""

    def __init__(self, traffic: Traffic) -> None:
        tenants = range(traffic.tenants) if traffic.only is None else (traffic.only,)
        self._new = heapq.merge(*(traffic.conversations(tenant) for tenant in tenants))
        self._next = next(self._new, None)
        self._back: list[tuple[float, int, Turn]] = []
        self._numbers = itertools.count()

    def put_back(self, time: float, turn: Turn) -> None:
        """The turn comes (again) at `time`."""
        heapq.heappush(self._back, (time, next(self._numbers), turn))

    @property
    def next_time(self) -> float:
        """When the next one comes; infinite if none does."""
        new = math.inf if self._next is None else self._next.time
        return min(new, self._back[0][0]) if self._back else new

    def due(self, now: float) -> Iterator[Turn]:
        """Those that have come by `now`."""
        while self.next_time <= now:
            if self._next is not None and self._next.time <= self.next_time:
                yield self._next
                self._next = next(self._new, None)
            else:
                yield heapq.heappop(self._back)[2]


def _geometric(rng: random.Random, mean: float) -> int:
    """1 or more, with this mean."""
    return 1 if mean <= 1 else 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


@cache
def _pool(vocab_size: int) -> tuple[int, ...]:
    """Random tokens, none of which ends a sequence."""
    rng = random.Random(vocab_size)
    return tuple(rng.randrange(FILLER + 1, vocab_size) for _ in range(_POOL))


def _words(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    """`count` tokens that nobody else says: from a random place of the pool, behind one of their own."""
    if not count:
        return ()
    pool, start = _pool(vocab_size), rng.randrange(_POOL)
    words = (rng.randrange(FILLER + 1, vocab_size), *pool[start : start + count - 1])
    while len(words) < count:
        words += pool[: count - len(words)]
    return words
