"""Every policy under everything that can happen to a sequence: what is said is what the kept entries say.

A tiny random model in float32. After each step pages must add up; at the end every log-probability must be that of a
dense pass that hides what was forgotten (`kept_oracle`), and published pages must never have been written.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Tokens
from quire.core.pruning import PruneParams
from quire.core.request import Request, SamplingParams
from quire.pruning.table import POLICIES
from quire.scheduler.client import load_in_process

from .kept_oracle import Recorder, expected_logprobs, load_reference

VOCAB = 97
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
    config, kind = transformers.LlamaConfig, transformers.LlamaForCausalLM
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

    def __init__(self, model: Path, **settings: Any) -> None:
        options: dict[str, Any] = {"page_size": 4, "max_num_seqs": 6, "max_batch_tokens": 24} | settings
        self.model = model
        self.loop = load_in_process(
            EngineConfig(model=str(model), device="cpu", dtype="float32", **options), lambda phase, done, total: None
        )
        self.recorder = Recorder(self.loop)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.last: dict[tuple[str, int], Tokens] = {}
        self.ended: dict[tuple[str, int], Finished] = {}
        self.failed: dict[str, Failed] = {}

    def submit(self, name: str, prompt: list[int], prune: PruneParams | None, **changes: Any) -> None:
        settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0} | changes
        self.requests[name] = Request(
            id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**settings), seed=5, prune=prune,
            repeat_ids=INSTRUCTION,
        )  # fmt: skip
        self.loop.submit(self.requests[name])

    def step(self) -> None:
        for event in self.loop.step().events:
            if isinstance(event, Failed):
                self.failed[event.request_id] = event
            elif isinstance(event, Finished):
                self.ended[event.request_id, event.index] = event
            else:
                self.tokens[event.request_id, event.index] += event.token_ids
                self.logprobs[event.request_id, event.index] += [entry.logprob for entry in event.logprobs or ()]
                self.last[event.request_id, event.index] = event
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
    assert serving.recorder.compactions >= 3
    serving.submit("b", [*first, 9, 9], params(policy), n=3, temperature=0.8)  # begins with what a published
    serving.submit("c", prompt(50, 2), params(policy, chunked=False))
    serving.run()
    serving.check()
    use = serving.last["a", 0].cache
    assert use is not None and use.dropped > 30 and use.kept + use.dropped == 61 + 11
    assert serving.last["plain", 0].cache is None
    totals = serving.loop.scheduler.stats().prunes[policy]
    assert totals.entries > 0 and totals.pages > 0 and set(totals.prunes) >= {"prompt", "decode"}
