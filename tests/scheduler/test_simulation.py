"""Random traffic against a fake engine: nothing is lost, mixed up or emitted twice, and the pool comes back whole.

Every step is followed by `check_integrity`; every text is compared with what the request gives alone.
"""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.errors import ContextLengthError, OverloadedError
from quire.core.ids import RequestId
from quire.core.pruning import PolicyInfo, PruneParams
from quire.core.request import Request, SamplingParams
from quire.core.speculation import DraftInfo, DraftMethod
from quire.scheduler.scheduler import SchedulerConfig
from quire.scheduler.sequence import choice_seed

from .fake_text import expected_output
from .world import World, make_config

VOCAB = 23
POLICIES = {
    "any": PolicyInfo(),
    "newest": PolicyInfo(observes="newest"),
    "all": PolicyInfo(observes="all"),
    "repeating": PolicyInfo(repeats=True),
    "selecting": PolicyInfo(selects=True),
}


def random_config(rng: random.Random) -> SchedulerConfig:
    """Small pools, all kinds of windows, any number of tokens a step."""
    layers, heads = rng.randint(1, 3), rng.randint(1, 2)
    size, rows = rng.choice([1, 2, 4, 8]), layers * heads
    kinds: list[int | None] = [None] if rng.random() < 0.5 else [None, None, 1, 3, 7, 20]
    windows = tuple(rng.choice(kinds) for _ in range(layers))
    return make_config(
        num_layers=layers,
        num_kv_heads=heads,
        page_size=size,
        num_pages=rows * rng.randint(1, 40 // size + 2),
        windows=windows,
        max_num_seqs=rng.randint(1, 9),
        max_batch_tokens=rng.choice([1, 2, 3, 5, 8, 16, 64]),
        max_waiting=rng.randint(1, 12),
        max_model_len=rng.randint(2, 48),
        vocab_size=VOCAB,
        eos_token_ids=rng.choice([(), (0,), (0, 1)]),
        prefix_cache=rng.random() < 0.9,
        num_host_pages=rng.choice([0, rows * rng.randint(1, 30)]),
        rope_length=rng.choice([None, None, None, 20]),
        policies=POLICIES if None in windows else {},
        prunes_under_pressure=rng.random() < 0.5,
        policy=rng.choice(["fcfs", "priority", "fair", "sjf"]),
        queue_timeout=rng.choice([None, None, None, 0.9]),
        max_waiting_tokens=rng.choice([None, None, 60]),
        max_itl=rng.choice([None, None, 0.01]),
        draft=random_draft(rng),
    )


def random_draft(rng: random.Random) -> DraftInfo | None:
    """Of any kind and length, or none."""
    methods: tuple[DraftMethod, ...] = ("model", "ngram", "hybrid", "layerskip")
    info = DraftInfo(
        method=rng.choice(methods), name="guesses", most=rng.choice([1, 2, 4, 16]), fixed=rng.random() < 0.5
    )
    return info if rng.random() < 0.6 else None


def random_pruning(rng: random.Random, config: SchedulerConfig, prompt: tuple[int, ...]) -> PruneParams | None:
    """Of every kind, or none; half of those with a context are pruned alike, to be shared."""
    if not config.policies or rng.random() < 0.5:
        return None
    context = rng.choice([0, 0, 4, len(prompt) // 2, max(len(prompt) - 1, 0)])
    if context and rng.random() < 0.5:
        policy = rng.choice(["any", "repeating"])
        return PruneParams(policy=policy, floor=2, window=1, sinks=1, context=context, every=rng.choice([0, 4]))
    policy = rng.choice(list(POLICIES))
    return PruneParams(
        policy=policy,
        keep=rng.choice([0.2, 0.5, 0.8, 1.0]),
        floor=rng.choice([1, 4]),
        window=rng.choice([1, 3]),
        sinks=rng.choice([0, 2]),
        chunked=rng.random() < 0.7,
        context=context,
        every=rng.choice([0, 1, 4]),
        when=rng.choice(["always", "pressure"]) if POLICIES[policy].relieves else "always",
    )


def random_prompt(rng: random.Random, config: SchedulerConfig, known: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Any tokens, or (part of) a `known` text with something after it: shared openings, continued dialogues."""
    length = rng.randint(1, rng.choice([4, 4, config.max_length]))
    opening = rng.choice(known) if known and rng.random() < 0.7 else ()
    opening = opening[: rng.choice([len(opening), rng.randint(0, len(opening))])]
    more = length if not opening else rng.choice([0, 0, 1, rng.randint(1, 6)])
    return opening[: config.max_length] + tuple(rng.randrange(VOCAB) for _ in range(more))


def random_request(rng: random.Random, name: str, config: SchedulerConfig, known: list[tuple[int, ...]]) -> Request:
    """Mostly one that fits."""
    max_tokens = rng.choice([None, None, 1, rng.randint(2, 40)])
    params: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": rng.choice([0, 0, min(5, max_tokens or 5)]),
        "ignore_eos": rng.random() < 0.3,
        "stop_token_ids": tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 0, 1, 3]))),
        "logprobs": rng.choice([None, None, None, 0]),
        "prompt_logprobs": rng.choice([None, None, None, 0]),
        "n": rng.choice([1, 1, 1, 2, 3]) if config.max_waiting >= 3 else 1,
    }
    prompt = random_prompt(rng, config, known)
    return Request(
        id=RequestId(name),
        prompt_ids=prompt,
        params=SamplingParams(**params),
        seed=rng.choice([7, rng.getrandbits(64)]),
        cache_salt=rng.choice(["", "", "", "a"]),
        cache_ttl=rng.choice([0.0, 0.0, 0.0, 0.5, 30.0]),
        prune=random_pruning(rng, config, prompt),
        repeat_ids=(1, 2),
        priority=rng.choice([0, 0, -1, 2]),
        tenant=rng.choice(["", "a", "b"]),
        timeout=rng.choice([None, None, None, None, rng.uniform(0.1, 9.0)]),
        speculate=rng.random() < 0.9,
        record=int(name[1:]) % 3 == 0,
    )


class Traffic:
    """Arrivals, cancels and failures at random; remembers what must come of them."""

    def __init__(self, rng: random.Random, config: SchedulerConfig, looks_ahead: bool = False) -> None:
        self.rng = rng
        self.world = World(config, looks_ahead)
        self.accepted: dict[str, Request] = {}
        self.aborted: set[str] = set()

    def arrive(self) -> None:
        """One request more; refusals are fine, but each accepted one must end."""
        name = f"r{len(self.accepted)}"
        request = self.request(name)
        try:
            self.world.scheduler.add(request)
        except (ContextLengthError, OverloadedError):
            return
        self.accepted[name] = request
        if self.rng.random() < 0.05:
            self.world.engine.failing_seeds.add(choice_seed(request.seed, self.rng.randrange(request.params.n)))

    def request(self, name: str) -> Request:
        """What arrives."""
        return random_request(self.rng, name, self.world.config, self.known_texts())

    def known_texts(self) -> list[tuple[int, ...]]:
        """Recent prompts with what was said to them so far."""
        recent = [self.accepted[name] for name in list(self.accepted)[-8:]]
        return [request.prompt_ids + tuple(self.world.tokens[request.id, 0]) for request in recent]

    def cancel(self) -> None:
        """Abort a recent request, whatever became of it."""
        if self.accepted:
            name = f"r{self.rng.randrange(max(0, len(self.accepted) - 12), len(self.accepted))}"
            if self.world.scheduler.abort(RequestId(name)):
                self.aborted.add(name)

    def step(self) -> None:
        """One step, sometimes with a cancel and an arrival while it is computed."""
        meanwhile = self.rng.random() < 0.1
        self.world.clock.now += 0.1
        self.world.step(between=self._meanwhile if meanwhile else lambda: None)

    def _meanwhile(self) -> None:
        self.cancel()
        self.arrive()

    def finish(self) -> None:
        """Drain, then hold every accepted request against what it gives alone."""
        self.world.run()
        self.world.scheduler._cache.reclaim_all()
        assert self.world.scheduler._cache._pool.free == self.world.config.num_pages
        for name, request in self.accepted.items():
            self._check(name, request)

    def _check(self, name: str, request: Request) -> None:
        world, ended = self.world, 0
        for index in range(request.params.n):
            tokens, end = world.tokens[name, index], world.finished.get((name, index))
            if request.prune is not None and request.prune.policy != "selecting":
                expected, reason = tokens, str(end and end.reason)  # what it forgets depends on its neighbours
            else:
                expected, reason = expected_output(request, index, world.config)
            assert tokens == expected[: len(tokens)], "other tokens than alone"
            recorded = world.recorded[name, index]
            assert recorded[: len(tokens)] == (tokens if request.record else []), "not what the tokens were drawn from"
            scores = world.prompt_scores[name, index]
            wanted = request.prompt_ids[1:] if request.params.prompt_logprobs is not None else ()
            assert scores == list(wanted[: len(scores)])
            if end is not None:
                ended += 1
                assert (tokens, end.reason, scores) == (expected, reason, list(wanted))
                assert 0 <= world.sequences[name, index].cached_tokens < len(request.prompt_ids)
        assert (ended == request.params.n) != (name in world.failed or name in self.aborted), "not exactly one end"
        assert not (name in world.failed and name in self.aborted)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), actions=st.lists(st.sampled_from("aaasssssc"), min_size=5, max_size=100))
def test_any_traffic_in_any_configuration(seed, actions):
    rng = random.Random(seed)
    traffic = Traffic(rng, random_config(rng), looks_ahead=rng.random() < 0.5)
    for action in actions:
        {"a": traffic.arrive, "s": traffic.step, "c": traffic.cancel}[action]()
    traffic.finish()


def soak(
    seed: int, config: SchedulerConfig, arrivals: int, looks_ahead: bool = False, kind: type[Traffic] = Traffic
) -> Traffic:
    """Step until so many requests were accepted, with arrivals a little faster than they can be served."""
    rng = random.Random(seed)
    traffic = kind(rng, config, looks_ahead)
    while len(traffic.accepted) < arrivals:
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            traffic.arrive()
        if rng.random() < 0.1:
            traffic.cancel()
        traffic.step()
    traffic.finish()
    return traffic


def test_a_long_run_in_a_small_pool():
    config = make_config(
        num_pages=70, windows=(None, 9), max_num_seqs=12, max_batch_tokens=20, vocab_size=VOCAB, policies=POLICIES
    )
    traffic = soak(1, config, arrivals=1200)
    stats = traffic.world.scheduler.stats()
    assert stats.preemptions_total > 50, "the pool was too large to test preemption"
    assert len(traffic.aborted) > 50 and len(traffic.world.failed) > 10


def test_a_long_run_of_shared_prefixes_in_a_small_pool():
    traffic = soak(2, make_config(num_pages=70, max_num_seqs=12, max_batch_tokens=20, vocab_size=VOCAB), arrivals=700)
    stats = traffic.world.scheduler.stats()
    assert stats.preemptions_total > 50, "the pool was too large to test preemption"
    assert stats.prefix_hits_total > stats.prefix_queries_total // 5, "too few hits to test sharing"


class Documents(Traffic):
    """Questions about a few documents, which are pruned in a few ways before the question is read."""

    def request(self, name: str) -> Request:
        """See `Traffic`."""
        request, rng = super().request(name), self.rng
        length = rng.choice([5, 8, 13, 21])
        prune = PruneParams(
            policy=rng.choice(["any", "any", "repeating"]),
            keep=rng.choice([0.3, 0.9]),
            floor=2,
            window=1,
            sinks=1,
            context=length,
            every=rng.choice([0, 0, 4]),
        )
        question = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 5)))
        prompt = tuple(range(length)) + question
        return msgspec.structs.replace(request, prompt_ids=prompt, prune=prune if rng.random() < 0.9 else None)


@pytest.mark.parametrize("num_host_pages", [0, 60])
def test_a_long_run_of_shared_pruned_prefixes_in_a_small_pool(num_host_pages):
    config = make_config(num_pages=70, num_host_pages=num_host_pages, max_batch_tokens=20, policies=POLICIES)
    traffic = soak(3, config, arrivals=400, kind=Documents)
    stats, engine = traffic.world.scheduler.stats(), traffic.world.engine
    assert stats.preemptions_total > 20, "the pool was too large to test preemption"
    assert stats.prefix_pruned_hits_total > stats.prefix_queries_total // 5, "too few hits to test sharing"
    assert engine.began_pruned > 80 and engine.duplicated > 300
    assert bool(stats.prefix_host_hits_total) == bool(num_host_pages)


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_many_short_runs_in_many_configurations(looks_ahead):
    preemptions, reasons, planned_ahead, accepted = 0, set[str](), 0, 0
    for seed in range(80):
        traffic = soak(seed, random_config(random.Random(1000 + seed)), 20, looks_ahead)
        stats = traffic.world.scheduler.stats()
        preemptions += stats.preemptions_total
        planned_ahead += traffic.world.planned_ahead
        accepted += stats.speculation.accepted_tokens
        assert stats.speculation.draft_tokens == traffic.world.engine.drafts
        reasons |= {reason for counts in stats.prunes.values() for reason in counts.prunes}
    assert preemptions > 50 and accepted > 500
    assert reasons == {"prompt", "decode", "pressure"}
    assert (planned_ahead > 100) == looks_ahead
