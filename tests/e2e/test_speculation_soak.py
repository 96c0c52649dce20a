"""Random traffic of all kinds over drafts, pruning, swapping, shared prefixes and pools that are too small.

Pages add up after every step; at the end all that was said is what the kept entries say, and what a request that
forgets nothing gets is what it gets alone and without drafts.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from quire.core.ids import RequestId
from quire.pruning.table import policy_infos

from .speculating import Stack, save_like
from .test_pruning_matrix import Serving, params, prompt, save

pytestmark = pytest.mark.usefixtures("swapping")
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "sliding": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
}


PARAMS: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.9, "seed": 2, "frequency_penalty": 0.7},
    {"temperature": 0.9, "seed": 3, "stop_token_ids": tuple(range(3, 15)), "min_tokens": 3},
    {"temperature": 1.0, "n": 2},
]


def load(folder: Path, kind: str, runner: str = "native") -> tuple[Stack, list[str]]:
    """A stack and the names of who may draft for it."""
    model = save(folder / "model", **KINDS[kind])
    names = ["ngram", str(model), str(save_like(folder / "like", model))]
    names += ["layerskip:1", "layerskip:2"] if runner == "native" else []
    return Stack(model, swap_memory=2**21, runner=runner), names


def send(serving: Serving, rng: random.Random, name: str) -> None:
    """Some request."""
    prune = None
    if rng.random() < 0.6:
        when = "pressure" if rng.random() < 0.3 else "always"
        policy = rng.choice([*policy_infos()])
        changes: dict[str, Any] = {"budget": rng.choice(["uniform", "ada"])} if policy not in ("quest", "kvzip") else {}
        changes |= {"when": when} if policy_infos()[policy].relieves else {}
        prune = params(policy, keep=rng.choice([0.3, 0.6]), every=rng.randint(0, 9), **changes)
    ids = prompt(rng.choice([12, 24]), rng.randrange(2)) + prompt(rng.randint(1, 30), rng.randrange(5))
    kind = rng.choice(PARAMS)
    serving.submit(
        name, ids, prune, speculate=rng.random() < 0.8, logprobs=rng.choice([None, 0]),
        max_tokens=rng.randint(3, 30), **kind,
    )  # fmt: skip


def soak(stack: Stack, names: list[str], seed: int, count: int) -> int:
    """So many requests; returns how many draft tokens were right. With every fourth seed these are hidden in trees."""
    rng, model = random.Random(seed), Path(stack.settings.model)
    trees = seed % 4 == 3
    info = stack.draft(rng.choice(names), most=rng.randint(1, 6), fixed=rng.random() < 0.7, trees=trees)
    settings: dict[str, Any] = {
        "num_pages": rng.randint(26, 60) * stack.rows,
        "max_batch_tokens": rng.choice([12, 30, 90]),
        "num_host_pages": rng.choice([0, stack.config.num_host_pages]),
        "prunes_under_pressure": rng.random() < 0.7,
        "policy": rng.choice(["fcfs", "fair", "sjf"]),
        "looks_ahead": rng.random() < 0.5,
    }
    serving, gone = Serving(model, stack.loop(info, **settings)), set()
    for number in range(count):
        send(serving, rng, f"r{number}")
        for _ in range(rng.choice([0, 1, 2, 5, 9])):
            serving.step()
        if rng.random() < 0.15:
            name = f"r{rng.randint(0, number)}"
            serving.loop.abort(RequestId(name))
            gone.add(name)
    serving.run()
    serving.check()
    assert not serving.failed
    alone = Serving(model, stack.loop(num_host_pages=0, prefix_cache=False))
    exact = [r for n, r in serving.requests.items() if n not in gone and r.prune is None]
    for request in exact:
        alone.loop.submit(request)
    alone.run()
    for name, index in alone.tokens:
        params = serving.requests[name].params
        assert (name, index) in serving.ended
        if params.greedy or params.seed is not None or info.method == "ngram":
            assert serving.tokens[name, index] == alone.tokens[name, index], name
    return serving.loop.stats().speculation.accepted_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_soak(tmp_path: Path, kind: str) -> None:
    stack, names = load(tmp_path, kind)
    assert sum(soak(stack, names, seed, 16) for seed in range(4)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_soak(tmp_path: Path, kind: str, runner: str) -> None:
    stack, names = load(tmp_path, kind, runner)
    assert sum(soak(stack, names, seed, 40) for seed in range(100, 140)) > 1000
