"""The loop that launches a step ahead gives every request the events of the plain one: a real tiny model in float32.

Traffic of all kinds comes and is cancelled at set tokens: greedy and seeded draws, penalties, biases, stop tokens,
minimum lengths, several choices, shared beginnings, sequences that prune, a pool too small for all.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Event, Finished, Tokens, single_events
from quire.core.pruning import PruneParams
from quire.core.request import Request, SamplingParams
from quire.engine.engine import Engine
from quire.engine.graphs import DecodeGraphs
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler

from .test_prefix import SHAPE, tokens

SHARED = tokens(21, seed=1)
ABORTS = {"aborted": 5, "aborted soon": 1}
"""Output tokens after which a request is cancelled."""
Told = dict[tuple[str, int], list[Any]]


def requests(prunable: bool) -> list[Request]:
    """One of each kind."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "drawn": {},
        "cut": {"top_p": 0.8, "top_k": 20},
        "penalised": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        "biased": {"logit_bias": {5: 8.0}, "min_p": 0.05},
        "stopped": {"stop_token_ids": tuple(range(3, 12)), "ignore_eos": False, "temperature": 1.5},
        "at least": {"stop_token_ids": tuple(range(3, 60)), "min_tokens": 12},
        "choices": {"n": 3, "temperature": 1.3},
        "short": {"max_tokens": 3},
        "aborted": {},
        "aborted soon": {},
        "scored": {"logprobs": 2, "max_tokens": 8},
        "pressed": {},
        "pruned": {"max_tokens": 20},
    }
    prunes = {
        "pressed": PruneParams(policy="keydiff", keep=0.5, when="pressure"),
        "pruned": PruneParams(policy="keydiff", keep=0.5),
    }
    return [
        Request(
            id=RequestId(name),
            prompt_ids=(*SHARED[: 5 * (number % 5)], *tokens(3 + number, seed=number)),
            params=SamplingParams(**{"max_tokens": 40, "ignore_eos": True} | params),
            seed=number,
            prune=prunes.get(name) if prunable else None,
        )
        for number, (name, params) in enumerate(kinds.items())
    ]


def serve(engine: Engine, config: Any, looks_ahead: bool) -> tuple[Told, int]:
    """What every choice is told, and how many steps were launched while one was in flight."""
    loop = EngineLoop(engine, scheduler := Scheduler(config), looks_ahead)
    told, ahead, waiting = defaultdict[tuple[str, int], list[Any]](list), 0, requests(None in engine.spec.windows)
    while waiting or loop.has_work:
        # In twos, with steady decoding in between.
        if waiting and scheduler.stats().steps_total % 9 == 0:
            loop.submit(waiting.pop(0))
            loop.submit(waiting.pop(0))
        for event in single_events(loop.step().events):
            tell(told, event)
            count = sum(map(len, (part for part in told[event.request_id, 0] if isinstance(part, list))))
            if isinstance(event, Tokens) and count == ABORTS.get(event.request_id):
                loop.abort(event.request_id)
        scheduler.check_integrity()
        ahead += len(loop._in_flight)
    assert loop.stats().pages_used == 0
    return told, ahead


def tell(told: Told, event: Event) -> None:
    """All of the event but times and what depends on neighbours."""
    assert isinstance(event, Tokens | Finished), event
    part = event.token_ids if isinstance(event, Tokens) else event.reason
    told[event.request_id, event.index].append(part)


def plain_graphs(engine: Engine) -> None:
    """Decode steps go through the code of CUDA graphs: all of them write their logits into one tensor."""

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        return work

    engine._graphs = DecodeGraphs(engine._runner, engine.cache, 8, engine._place.backend, capture)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "mistral-sliding-window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=9),
}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_loops_tell_the_same(tmp_path: Path, kind: str, graphs: bool) -> None:
    torch.manual_seed(11)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(tmp_path)
    settings = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        dtype="float32",
        page_size=4,
        max_num_seqs=8,
        max_batch_tokens=32,
        kv_memory=400_000,
        pressure="prune",
        draft="none",
    )
    loop = load_in_process(settings)
    engine, config = loop.engine, loop.scheduler.config
    assert isinstance(engine, Engine)
    plain, never = serve(engine, config, looks_ahead=False)
    if graphs:
        plain_graphs(engine)
    told, ahead = serve(engine, config, looks_ahead=True)
    assert never == 0 and ahead > 20
    assert told == plain
    assert len(told["aborted", 0]) == 5 and told["choices", 2][-1] == "length"
