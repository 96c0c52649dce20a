"""Small worlds for scheduler tests: a configuration, requests, and a driver that checks after every step."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

from quire.core.ids import RequestId
from quire.core.messages import Event, Failed, Finished, Recorded, Tokens, single_events
from quire.core.plan import BatchPlan, StepOutput
from quire.core.prefix import Bundle
from quire.core.request import Request, SamplingParams
from quire.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.scheduler.sequence import SequenceState

from .fake_engine import FakeEngine

EOS = 0


def make_config(**changes: Any) -> SchedulerConfig:
    """Two layers of one head, pages of 4, room for 50 bundles, except for `changes`."""
    values: dict[str, Any] = {
        "num_pages": 100,
        "page_size": 4,
        "num_layers": 2,
        "num_kv_heads": 1,
        "max_num_seqs": 8,
        "max_batch_tokens": 32,
        "max_waiting": 100,
        "max_model_len": 64,
        "vocab_size": 50,
        "eos_token_ids": (EOS,),
    } | changes
    return SchedulerConfig(**{"windows": (None,) * values["num_layers"]} | values)


def make_request(name: str = "r", prompt: Iterable[int] = (5, 6, 7), seed: int = 1, **params: Any) -> Request:
    """A request that does not stop by chance, unless `ignore_eos` is among `params`.

    `priority`, `tenant`, `timeout` and `speculate` are the request's own, all others of its sampling parameters.
    """
    own = {name: params.pop(name) for name in ("priority", "tenant", "timeout", "speculate") if name in params}
    params = {"ignore_eos": True, "max_tokens": 4} | params
    return Request(id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**params), seed=seed, **own)


class FakeClock:
    """Seconds that pass only by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class World:
    """A scheduler with a fake engine, stepped by hand; collects what each choice received."""

    def __init__(self, config: SchedulerConfig, looks_ahead: bool = False) -> None:
        self.config = config
        self.looks_ahead = looks_ahead
        self.planned_ahead = 0
        """Steps that were launched while one was in flight."""
        self._in_flight: deque[tuple[BatchPlan, StepOutput]] = deque()
        self._known: set[Bundle] = set()
        """Published before the plan that is being made."""
        self.clock = FakeClock()
        self.scheduler = Scheduler(config, clock=self.clock)
        self.engine = FakeEngine(config)
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.recorded: dict[tuple[str, int], list[int]] = defaultdict(list)
        """The fake engine's rows are the tokens in writing."""
        self.prompt_scores: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.finished: dict[tuple[str, int], Finished] = {}
        self.failed: dict[str, Failed] = {}
        self.sequences: dict[tuple[str, int], SequenceState] = {}
        """All that ever ran."""

    def step(self, between: Callable[[], object] = lambda: None) -> BatchPlan | None:
        """One checked step: launched, perhaps with the next one, and committed; `between` runs between the two."""
        for event in self.scheduler.tend():
            self._collect(event)
        had_work = self.scheduler.has_work
        if not self._in_flight:
            plan = self.scheduler.plan()
            assert (plan is not None) == had_work
            if plan is None:
                return None
            self._launch(plan)
        if self.looks_ahead and (ahead := self.scheduler.look_ahead()) is not None:
            self.planned_ahead += 1
            self._launch(ahead)
        self.sequences |= {(sequence.request.id, sequence.index): sequence for sequence in self.scheduler._running}
        between()
        plan, output = self._in_flight.popleft()
        self.scheduler.check_integrity()
        for event in single_events(self.scheduler.commit(plan, output)):
            self._collect(event)
        self.scheduler.check_integrity()
        self.engine.protect(self.published_pages(), self._pruned_pages())
        self._known = self._bundles()
        return plan

    def _launch(self, plan: BatchPlan) -> None:
        self.scheduler.check_integrity()
        arriving = set(plan.swap_ins.device.tolist())
        # What the plan itself publishes, it fills first.
        offered = self._pages_of({b for b in self._bundles() - self._known if b.kept is not None})
        self.engine.protect(self.published_pages() - arriving - offered, self._pruned_pages())
        self.engine.arriving = self.published_pages() & arriving
        self._in_flight.append((plan, self.engine.step(plan)))

    def published_pages(self) -> set[int]:
        """Pages that sequences to come may begin with, or that a running one shares."""
        return self._pages_of(self._bundles())

    def _pruned_pages(self) -> set[int]:
        """Those of them that hold pruned prefixes."""
        return self._pages_of({bundle for bundle in self._bundles() if bundle.kept is not None})

    def _bundles(self) -> set[Bundle]:
        shared = {bundle for sequence in self.scheduler._running for bundle in (*sequence.blocks, sequence.base)}
        return {bundle for bundle in shared if bundle is not None} | {*self.scheduler._cache._index}

    @staticmethod
    def _pages_of(bundles: set[Bundle]) -> set[int]:
        return {page for bundle in bundles if bundle.pages is not None for page in bundle.pages.tolist()}

    def run(self, max_steps: int = 10_000) -> int:
        """Step until there is no work; returns the number of steps."""
        for count in range(max_steps):
            if self.step() is None:
                self.check_idle()
                return count
        raise AssertionError(f"still work after {max_steps} steps")

    def check_idle(self) -> None:
        """Every page is free or kept for its prefix, and all can be free."""
        stats, cache = self.scheduler.stats(), self.scheduler._cache
        assert stats.pages_used == stats.running == stats.waiting == 0
        assert stats.pages_cached == len(self.published_pages()) == self.config.num_pages - cache._pool.free
        assert cache.available + cache._index.num_held_pages == self.config.num_pages
        assert stats.host_pages_parked == 0 and stats.host_pages_cached <= stats.host_pages_total

    def _collect(self, event: Event) -> None:
        assert event.request_id not in self.failed, "an event after the request failed"
        if isinstance(event, Failed):
            self.failed[event.request_id] = event
            return
        key = (event.request_id, event.index)
        assert key not in self.finished, "an event after the end"
        if isinstance(event, Recorded):
            assert len(self.recorded[key]) == len(self.tokens[key]), "rows come before their tokens"
            self.recorded[key] += [int(row) for row in event.rows]
        elif isinstance(event, Tokens):
            self.tokens[key] += event.token_ids
            self.prompt_scores[key] += [entry.token_id for entry in event.prompt_logprobs or ()]
        else:
            self.finished[key] = event


def step(world: World) -> BatchPlan:
    """One step of a world that has something to do."""
    plan = world.step()
    assert plan is not None
    return plan
