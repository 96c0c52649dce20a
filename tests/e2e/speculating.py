"""The whole stack with any drafter: one loaded target, and for each run a fresh scheduler, checked after every step."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Logprob, Recorded, single_events
from quire.core.plan import BatchPlan, StepOutput
from quire.core.request import Request, SamplingParams
from quire.core.speculation import DraftInfo, SpeculationCounts, StepCosts
from quire.engine.engine import Engine
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler
from quire.speculation.drafter import Drafter
from quire.speculation.loading import load_draft, make_drafter

from ..engine.scripted import BranchingDrafter

PAGE = 4
CHEAP = StepCosts(rows=[(1, 1.0), (64, 1.1)], drafts=[(1, 0.01), (8, 0.01)])
"""Of a machine on which drafts pay, in ticks of `ticking`."""


def save(folder: Path, config: transformers.PretrainedConfig, seed: int = 5) -> Path:
    """A random tiny model."""
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return folder


def save_like(folder: Path, model: Path, noise: float = 0.06) -> Path:
    """A draft model that often agrees with a saved one: its weights, disturbed."""
    other = transformers.AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(noise * weight.std() * torch.randn_like(weight))
    other.save_pretrained(folder)
    return folder


def ticking() -> Callable[[], float]:
    """A clock on which every step takes about as long as any other."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@dataclass
class Choice:
    """What a choice was told, however it was cut into messages."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    recorded: list[bytes] = field(default_factory=list)
    end: str | None = None
    """The reason, or the kind of an error."""
    cached: int = 0
    most_at_once: int = 0
    """Tokens of one message."""


Told = dict[tuple[str, int], Choice]
Abort = Callable[[Choice], bool]


@dataclass
class Run:
    """One schedule of requests, served to its end."""

    told: Told
    counts: SpeculationCounts
    loop: EngineLoop
    cut_short: int
    """Runs of accepted tokens in which a sequence ended before the last."""
    ahead: int
    """Steps launched while another was in flight."""


class Stack:
    """A target model on the CPU in float32 with small pages, and its drafters."""

    def __init__(self, model: Path, **settings: Any) -> None:
        options: dict[str, Any] = {"page_size": PAGE, "max_num_seqs": 8, "max_batch_tokens": 48, "kv_memory": 2**20}
        options |= {"model": str(model), "device": "cpu", "dtype": "float32", "max_model_len": 160} | settings
        self.settings = EngineConfig(**options)
        loop = load_in_process(self.settings)
        assert isinstance(loop.engine, Engine)
        self.engine, self.config = loop.engine, loop.scheduler.config
        self.rows = self.config.num_rows
        self._drafts: dict[str, Any] = {}

    def draft(self, name: str, most: int = 4, fixed: bool = True, trees: bool = False) -> DraftInfo:
        """Let somebody draft from now on, named as in `EngineConfig.draft`; what the scheduler is to know of it.

        trees: what is proposed is hidden in them.
        """
        engine: Any = self.engine
        config = EngineConfig(model=self.settings.model, draft=name, dtype="float32", device="cpu")
        place = engine._place
        if name not in self._drafts:
            self._drafts[name] = load_draft(config, engine._runner, place, lambda phase, done, total: None)
        drafter: Drafter | None = make_drafter(
            config, engine._runner, self._drafts[name], engine.cache, place,
            max_model_len=engine.info.max_model_len, num_slots=self.config.max_num_seqs,
        )  # fmt: skip
        assert drafter is not None
        if trees:
            drafter = BranchingDrafter(drafter, engine.spec.vocab_size)
        engine.draft_with(drafter, config)
        return DraftInfo(method=drafter.method, name=name, most=most, fixed=fixed, costs=CHEAP)

    def loop(self, draft: DraftInfo | None = None, looks_ahead: bool = False, **changes: Any) -> EngineLoop:
        """A fresh scheduler before the engine, which forgets what it did; changes: of `SchedulerConfig`."""
        scheduler = Scheduler(replace(self.config, draft=draft, **changes), ticking())
        return EngineLoop(self.engine, scheduler, looks_ahead)

    def serve(
        self,
        requests: Sequence[Request],
        draft: DraftInfo | None = None,
        aborts: Mapping[str, Abort] | None = None,
        looks_ahead: bool = False,
        loop: EngineLoop | None = None,
        **changes: Any,
    ) -> Run:
        """Two requests come every few steps. loop: one that has served others; changes: of `SchedulerConfig`."""
        loop = loop or self.loop(draft, looks_ahead, **changes)
        scheduler = loop.scheduler
        told: Told = defaultdict(Choice)
        run, waiting = Run(told, SpeculationCounts(), loop, 0, 0), list(requests)
        _watch(loop, run)
        for turn in itertools.count():
            assert turn < 3000, "it does not end"
            if waiting and turn % 5 == 0:
                for request in waiting[:2]:
                    loop.submit(request)
                del waiting[:2]
            elif not waiting and not loop.has_work:
                break
            for event in single_events(loop.step().events):
                self._tell(told, event)
                leaves = (aborts or {}).get(event.request_id)
                if leaves and leaves(told[event.request_id, 0]):
                    loop.abort(event.request_id)
            scheduler.check_integrity()
            run.ahead += len(loop._in_flight)
        stats = loop.stats()
        assert stats.pages_used == 0 and scheduler._cache.available == stats.pages_total
        run.counts = stats.speculation
        return run

    @staticmethod
    def _tell(told: Told, event: Any) -> None:
        if isinstance(event, Failed):
            told[event.request_id, 0].end = event.error.kind
            return
        choice = told[event.request_id, event.index]
        if isinstance(event, Recorded):
            assert len(choice.recorded) == len(choice.tokens), "rows come before their tokens"
            choice.recorded += event.rows
        elif isinstance(event, Finished):
            choice.end = event.reason
        else:
            choice.tokens += event.token_ids
            choice.cached += event.cached_tokens
            choice.logprobs += event.logprobs or ()
            choice.prompt_logprobs += event.prompt_logprobs or ()
            choice.most_at_once = max(choice.most_at_once, len(event.token_ids))


def _watch(loop: EngineLoop, run: Run) -> None:
    """Count what was accepted past an end."""
    scheduler: Any = loop.scheduler
    commit = scheduler.commit

    def watched(plan: BatchPlan, output: StepOutput) -> Any:
        before = scheduler._generation_tokens
        accepted = sum(len(result.token_ids) for result in output.sequences)
        accepted += len(output.decoded) if output.runs is None else int(output.runs.counts.sum())
        events = commit(plan, output)
        run.cut_short += accepted > scheduler._generation_tokens - before
        return events

    scheduler.commit = watched


def request(name: str, prompt: Sequence[int], seed: int = 5, seeded: bool = True, **settings: Any) -> Request:
    """Up to 24 tokens, past the model's own end unless `settings` say otherwise; seeded: as its user wishes."""
    own = {key: settings.pop(key) for key in Request.__struct_fields__ if key in settings}
    params: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "seed": seed if seeded else None} | settings
    return Request(
        id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**params), seed=seed, **own
    )  # fmt: skip


def assert_equal(told: Told, expected: Told, exactly: bool = True) -> None:
    """All that does not depend on neighbours and timing; exactly: `told` has all that `expected` has."""
    assert not exactly or told.keys() == expected.keys()
    for key, choice in told.items():
        other = expected[key]
        assert (choice.tokens, choice.end) == (other.tokens, other.end), key
        for mine, theirs in ((choice.logprobs, other.logprobs), (choice.prompt_logprobs, other.prompt_logprobs)):
            assert [entry.token_id for entry in mine] == [entry.token_id for entry in theirs], key
            values, wanted = ([[e.logprob, *(v for _, v in e.top)] for e in part] for part in (mine, theirs))
            torch.testing.assert_close(torch.tensor(values), torch.tensor(wanted), atol=2e-4, rtol=1e-3, msg=str(key))
