"""Every policy under everything that can happen to a sequence: what is said is what the kept entries say.

A tiny random model in float32. After each step pages must add up; at the end every log-probability must be that of a
dense pass that hides what was forgotten (`kept_oracle`), and published pages must never have been written.
"""

import itertools
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, ContextLengthError
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Tokens, single_events
from quire.core.pruning import PruneParams
from quire.core.request import Request, SamplingParams
from quire.pruning.budgets import BUDGETS
from quire.pruning.table import POLICIES, SELECTORS, policy_infos
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop
from quire.scheduler.swap import SwapCosts

from .kept_oracle import Recorder, expected_logprobs, load_reference

VOCAB = 97
PAGE_BYTES = 4 * (2 * 8 * 4 + 4)
QUICK = ("knorm", "snapkv", "expected")
"""One policy of each kind of observation that comes cheap: these under everything, others under one thing less."""
RELIEVING = [name for name, info in policy_infos().items() if info.relieves]
INSTRUCTION = (5, 6, 7)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}


def save(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(11)
    config, kind = cast(Any, (transformers.LlamaConfig, transformers.LlamaForCausalLM))
    if "sliding_window" in changes:
        config, kind = transformers.Qwen2Config, transformers.Qwen2ForCausalLM
    kind(config(**SHAPE | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mixed = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    kinds: dict[str, dict[str, Any]] = {"gqa": {}, "mqa": {"num_key_value_heads": 1}, "sliding": mixed}
    return {kind: save(tmp_path_factory.mktemp(kind), **changes) for kind, changes in kinds.items()}


def params(policy: str, **changes: Any) -> PruneParams:
    """Small numbers for small prompts."""
    values: dict[str, Any] = {"policy": policy, "keep": 0.4, "floor": 6, "window": 5, "sinks": 2, "every": 4} | changes
    return PruneParams(**values)


class Serving:
    """A loop whose every step is checked; remembers what each choice was told."""

    def __init__(self, model: Path, loop: EngineLoop | None = None, **settings: Any) -> None:
        options: dict[str, Any] = {
            "page_size": 4,
            "max_num_seqs": 6,
            "max_batch_tokens": 24,
            "draft": "none",
        } | settings
        self.model = model
        self.loop = loop or load_in_process(EngineConfig(model=str(model), device="cpu", dtype="float32", **options))
        self.recorder = Recorder(self.loop)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.prompt_logprobs: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.last: dict[tuple[str, int], Tokens] = {}
        self.first: dict[tuple[str, int], Tokens] = {}
        """What brought the first token."""
        self.ended: dict[tuple[str, int], Finished] = {}
        self.failed: dict[str, Failed] = {}

    def submit(
        self, name: str, prompt: list[int], prune: PruneParams | None, speculate: bool = True, **changes: Any
    ) -> None:
        settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0} | changes
        self.requests[name] = Request(
            id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**settings), seed=5, prune=prune,
            repeat_ids=INSTRUCTION, speculate=speculate,
        )  # fmt: skip
        self.loop.submit(self.requests[name])

    def step(self) -> None:
        for event in single_events(self.loop.step().events):
            if isinstance(event, Failed):
                self.failed[event.request_id] = event
            elif isinstance(event, Finished):
                self.ended[event.request_id, event.index] = event
            elif isinstance(event, Tokens):
                self.tokens[event.request_id, event.index] += event.token_ids
                self.logprobs[event.request_id, event.index] += [entry.logprob for entry in event.logprobs or ()]
                self.prompt_logprobs[event.request_id, event.index] += [e.logprob for e in event.prompt_logprobs or ()]
                self.last[event.request_id, event.index] = event
                if event.token_ids:
                    self.first.setdefault((event.request_id, event.index), event)
        self.loop.scheduler.check_integrity()

    def run(self) -> None:
        for _ in range(600):
            if not self.loop.has_work:
                break
            self.step()
        assert not self.loop.has_work, "it does not end"
        stats = self.loop.scheduler.stats()
        assert stats.pages_used == 0 and self.loop.scheduler._cache.available == stats.pages_total

    def check(self) -> None:
        """All that was said is what the kept entries say."""
        reference = load_reference(self.model)
        for (name, index), tokens in self.tokens.items():
            prompt = list(self.requests[name].prompt_ids)
            expected = expected_logprobs(reference, self.recorder.lives[name, index], prompt, tokens)
            told = torch.tensor(self.logprobs[name, index])
            said = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
            if self.requests[name].params.logprobs is not None:
                torch.testing.assert_close(told, said, atol=2e-4, rtol=1e-3)
            if self.requests[name].params.greedy:
                assert (expected.amax(1) - said < 1e-3).all(), "not the likeliest token"


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(3, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_said_is_what_the_kept_entries_say(models: dict[str, Path], policy: str) -> None:
    serving = Serving(models["gqa"])
    first = prompt(61)
    serving.submit("plain", prompt(30, 1), None)
    serving.submit("a", first, params(policy))
    serving.run()
    once = policy == "kvzip"  # what is generated later was not repeated
    assert serving.recorder.compactions >= (1 if once else 3)
    serving.submit("b", [*first, 9, 9], params(policy), n=3, temperature=0.8)  # begins with what a published
    serving.submit("c", prompt(50, 2), params(policy, chunked=False))
    serving.run()
    serving.check()
    use = serving.last["a", 0].cache
    assert use is not None and use.dropped > 30 and use.kept + use.dropped == 61 + 11
    assert serving.last["plain", 0].cache is None
    totals = serving.loop.scheduler.stats().prunes[policy]
    assert totals.entries > 0 and totals.pages > 0
    assert set(totals.prunes) == ({"prompt"} if once else {"prompt", "decode"})
    # What a sequence computed is anybody's until it first forgets: here after its second chunk, at 41 tokens, or, where
    # it is repeated first, with the whole prompt. But who must have seen all queries begins with nobody's keys.
    observes_all = serving.loop.engine.info.policies[policy].observes == "all"
    assert serving.first["b", 0].cached_tokens == (0 if observes_all else 60 if once else 40)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bytes_of_what_is_forgotten_come_back(models: dict[str, Path], policy: str) -> None:
    serving = Serving(models["gqa"], prefix_cache=False)
    cache, info = serving.recorder._engine.cache, serving.loop.engine.info
    held: dict[str, int] = {}
    assert cache.pool[0].nbytes + cache.entry_positions[0].nbytes == PAGE_BYTES
    assert info.kv_bytes == PAGE_BYTES * info.num_pages
    for name, prune in (("whole", None), ("pruned", params(policy))):
        serving.submit(name, prompt(61), prune, max_tokens=20)
        while serving.loop.has_work:
            serving.step()
            held[name] = serving.loop.scheduler.stats().pages_used or held[name]
        assert info.kv_bytes == PAGE_BYTES * serving.loop.scheduler._cache.available
    use = serving.last["pruned", 0].cache
    assert use is not None and use.dropped > 30
    assert held["whole"] * PAGE_BYTES == 6 * 20 * PAGE_BYTES, "80 entries of each of 6 heads"
    assert held["pruned"] * PAGE_BYTES <= 6 * (use.kept // 4 + 1) * PAGE_BYTES


def cells() -> list[Any]:
    """Each policy, kind of model and runner: the quick policies in small and in large chunks, others in one of both."""
    found = []
    for cell in itertools.product(POLICIES, ("gqa", "mqa", "sliding"), ("native", "transformers"), (24, 200)):
        policy, _, runner, chunk = cell
        spared = policy not in QUICK and (runner == "native") == (chunk == 24)
        found.append(pytest.param(*cell, marks=pytest.mark.slow if spared else ()))
    return found


@pytest.mark.parametrize(("policy", "kind", "runner", "chunk"), cells())
def test_kinds_of_models_and_runners(models: dict[str, Path], policy: str, kind: str, runner: str, chunk: int) -> None:
    serving = Serving(models[kind], runner=runner, max_batch_tokens=chunk)
    serving.submit("a", prompt(45), params(policy, refine=("value-norm",)))
    serving.submit("b", prompt(33, 1), params(policy, refine=("chunk",), every=0), n=2, temperature=0.7)
    serving.run()
    assert serving.recorder.compactions >= 3
    serving.check()


@pytest.mark.parametrize("budget", [name for name in BUDGETS if name != "uniform"])
def test_heads_of_unequal_length(models: dict[str, Path], budget: Any) -> None:
    serving = Serving(models["gqa"])
    special: dict[str, dict[str, Any]] = {"threshold": {"threshold": 0.02}, "pyramid": {"window": 1, "sinks": 0}}
    changes = special.get(budget, {})
    for policy in ("snapkv", "h2o"):
        serving.submit(policy, prompt(61), params(policy, budget=budget, **changes), max_tokens=20)
    serving.run()
    serving.check()
    assert serving.recorder.compactions >= 4
    lives = [serving.recorder.lives[policy, 0][0] for policy in ("snapkv", "h2o")]
    counts = [len([key for key in life.forgotten if key[:2] == (layer, head)])
              for life in lives for layer in range(3) for head in range(2)]  # fmt: skip
    assert len(set(counts)) > 1


@pytest.mark.parametrize(("policy", "budget"), [("knorm", "uniform"), ("snapkv", "global"), ("expected", "ada")])
def test_a_prompt_larger_than_the_pool(models: dict[str, Path], policy: str, budget: Any) -> None:
    serving = Serving(models["gqa"], kv_memory=6 * 14 * PAGE_BYTES)  # 56 entries per head
    serving.submit("large", prompt(120), params(policy, keep=0.2, budget=budget), max_tokens=16)
    for number in range(3):
        serving.submit(f"small{number}", prompt(20, number), None)
    serving.run()
    serving.check()
    assert len(serving.tokens["large", 0]) == 16 and not serving.failed
    with pytest.raises(ContextLengthError):
        serving.loop.scheduler.add(
            Request(id=RequestId("whole"), prompt_ids=tuple(prompt(120)), params=SamplingParams(max_tokens=16), seed=1)
        )


@pytest.mark.parametrize(("policy", "chunked"), [("snapkv", True), ("knorm", False), ("kvzip", True)])
def test_a_context_is_pruned_before_the_question(models: dict[str, Path], policy: str, chunked: bool) -> None:
    serving = Serving(models["gqa"], max_batch_tokens=24)
    serving.submit("a", prompt(61), params(policy, context=40, chunked=chunked, every=0))
    serving.submit("b", prompt(33, 1), params(policy, context=200))
    serving.run()
    serving.check()
    ((life, *_),) = [lives for (name, _), lives in serving.recorder.lives.items() if name == "a"]
    assert life.forgotten and all(position < 40 for *_, position in life.forgotten), "of the context alone"


@pytest.mark.parametrize("policy", policy_infos())
def test_cancelled_at_any_moment_it_leaves_nothing_behind(models: dict[str, Path], policy: str) -> None:
    alone = Serving(models["gqa"])
    alone.submit("other", prompt(30, 1), None, max_tokens=20)
    alone.run()
    serving = Serving(models["gqa"])
    for steps in range(1, 10, 1 if policy in QUICK else 3):
        serving.tokens.clear()
        serving.logprobs.clear()
        serving.ended.clear()
        serving.submit("other", prompt(30, 1), None, max_tokens=20)
        serving.submit("a", prompt(61), params(policy))
        for _ in range(steps):
            serving.step()
        serving.loop.abort(RequestId("a"))
        serving.run()
        assert serving.tokens["other", 0] == alone.tokens["other", 0]
        told, expected = serving.logprobs["other", 0], alone.logprobs["other", 0]
        torch.testing.assert_close(torch.tensor(told), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert ("a", 0) not in serving.ended


def crowd(serving: Serving, prune: PruneParams, count: int = 5) -> None:
    """More sequences than the pool holds."""
    for number in range(count):
        # Without log-probabilities a sequence decodes in columns.
        logprobs = 0 if number % 2 else None
        serving.submit(f"r{number}", prompt(40, number), prune, max_tokens=40, logprobs=logprobs)
    serving.run()
    assert not serving.failed and len(serving.ended) == count
    serving.check()


@pytest.mark.parametrize("policy", RELIEVING)
def test_under_pressure_pruning_spares_preemption(models: dict[str, Path], policy: str) -> None:
    settings: dict[str, Any] = {"kv_memory": 60 * 6 * PAGE_BYTES, "prefix_cache": False}
    yielding = Serving(models["gqa"], pressure="prune", **settings)
    crowd(yielding, params(policy, when="pressure"))
    stats = yielding.loop.scheduler.stats()
    assert stats.preemptions_total == 0 and set(stats.prunes[policy].prunes) == {"pressure"}
    stubborn = Serving(models["gqa"], **settings)
    crowd(stubborn, params(policy, when="pressure"))
    assert stubborn.loop.scheduler.stats().preemptions_total > 0
    assert stubborn.recorder.compactions == 0


@pytest.mark.parametrize("pressure", ["prune", "preempt"])
def test_a_pool_for_one_serves_all(models: dict[str, Path], pressure: str) -> None:
    """Shared prefixes, pruned and preempted sequences in a pool that hardly holds one of them."""
    serving = Serving(models["gqa"], kv_memory=21 * 6 * PAGE_BYTES, pressure=pressure)
    serving.submit("long", prompt(60), params("snapkv", keep=0.7), max_tokens=15, n=2, temperature=0.5)
    serving.submit("plain", prompt(50), None, max_tokens=25)
    serving.submit("twin", prompt(60), params("knorm", when="pressure"), max_tokens=15)
    serving.submit("zip", prompt(40), params("kvzip"), max_tokens=15)
    serving.run()
    assert not serving.failed and len(serving.ended) == 5
    serving.check()


@pytest.mark.parametrize("policy", policy_infos())
def test_swapped_out_and_in_it_forgets_the_same(
    models: dict[str, Path], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)

    def serve(swaps: str) -> Serving:
        serving = Serving(models["gqa"], swap_memory=2**22)
        scheduler = serving.loop.scheduler
        for name, length in (("a", 61), ("b", 40)):
            serving.submit(name, prompt(length, length), params(policy, refine=("value-norm",)), max_tokens=20)
        for number in range(200):
            serving.step()
            for sequence in list(scheduler._running if number % 3 == 1 else ()):
                # What was chosen and not compacted yet is given up by a preemption, and chosen anew; what is repeated
                # together depends on the neighbours.
                chosen = sequence.prune is not None and sequence.prune.counts is not None
                at_rest = not chosen and not scheduler._pruning.repeats(sequence)
                if swaps == "any" or (swaps == "at rest" and at_rest):
                    scheduler._preempt(sequence)
            if not serving.loop.has_work:
                break
        serving.run()
        serving.check()
        assert len(serving.ended) == 2 and scheduler.stats().lossy_preemptions_total == 0
        return serving

    plain, swapped = serve("never"), serve("at rest")
    assert swapped.loop.stats().swap_in_sequences_total >= 10
    assert serve("any").loop.stats().swap_in_sequences_total >= 10
    assert swapped.tokens == plain.tokens
    for key, said in plain.logprobs.items():
        torch.testing.assert_close(torch.tensor(swapped.logprobs[key]), torch.tensor(said), atol=1e-5, rtol=1e-5)
        (mine,), other = swapped.recorder.lives[key], plain.recorder.lives[key][0]
        assert (mine.forgotten, mine.passed_over) == (other.forgotten, other.passed_over)
    assert policy in SELECTORS or plain.recorder.compactions > 0


def test_keep_one_costs_nothing(models: dict[str, Path]) -> None:
    serving = Serving(models["gqa"])
    serving.submit("a", prompt(61), params("h2o", keep=1.0))
    serving.run()
    serving.check()
    assert serving.recorder.compactions == 0 and not serving.loop.scheduler.stats().prunes


def test_what_the_model_or_the_engine_does_not_know_is_refused(models: dict[str, Path]) -> None:
    serving = Serving(models["gqa"])
    serving.submit("a", prompt(9), params("nonsense"))
    serving.run()
    error = serving.failed["a"].error
    assert error.kind == "InvalidRequestError" and "nonsense" in error.message and "snapkv" in error.message
    with pytest.raises(ConfigError, match="nonsense"):
        Serving(models["gqa"], prune=params("nonsense"))
    for policy in ("kvzip", "quest"):
        with pytest.raises(ConfigError, match=f"'{policy}' cannot prune under pressure"):
            Serving(models["gqa"], pressure="prune", prune=params(policy, when="pressure"))


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize(("kind", "chunk"), [("gqa", 24), ("mqa", 200), ("sliding", 24)])
@pytest.mark.parametrize("policy", SELECTORS)
def test_a_selector_reads_a_part_and_forgets_nothing(
    models: dict[str, Path], policy: str, kind: str, chunk: int, runner: str
) -> None:
    serving = Serving(models[kind], runner=runner, max_batch_tokens=chunk)
    few, all_pages = params(policy, keep=0.2, floor=8), params(policy, keep=0.9)
    serving.submit("few", prompt(61), few, max_tokens=20, logprobs=None)
    serving.submit("all", prompt(61), all_pages, max_tokens=20)
    serving.submit("dense", prompt(61), None, max_tokens=20)
    serving.run()
    serving.submit("again", prompt(61), few, max_tokens=20)  # begins with pages that others computed
    serving.run()
    serving.check()
    assert serving.recorder.compactions == 0 and not serving.loop.scheduler.stats().prunes
    # Of layers with windows the prompt's pages are gone: nobody can begin with the others.
    assert serving.first["again", 0].cached_tokens == (0 if kind == "sliding" else 60)
    passed = {name: serving.recorder.lives[name, 0][0].passed_over for name in ("few", "all", "dense", "again")}
    windows = serving.recorder._engine.spec.windows
    reading = {layer for layer in range(SELECTORS[policy]().dense_layers, 3) if windows[layer] is None}
    assert {layer for layer, _, _ in passed["few"]} == reading and not passed["dense"]
    left_out = {name: sum(map(len, choice.values())) for name, choice in passed.items()}
    assert passed["few"] == passed["again"] and (left_out["all"] < left_out["few"] or not reading)
