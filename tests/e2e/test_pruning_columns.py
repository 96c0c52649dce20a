"""A sequence that prunes decodes as a row of columns between its prunes; neither it nor its neighbours can tell."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.core.plan import BatchPlan

from .test_pruning_matrix import Serving, params, prompt, save

EVERY, OUTPUT = 6, 26


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("columns"))


def watched_steps(serving: Serving) -> list[tuple[int, int]]:
    """(rows of columns, prunes) of each step to come."""
    steps: list[tuple[int, int]] = []
    engine: Any = serving.loop.engine
    launch = engine.launch

    def watch(plan: BatchPlan) -> Any:
        steps.append((len(plan.decodes), len(plan.prunes)))
        return launch(plan)

    engine.launch = watch
    return steps


@pytest.mark.parametrize("policy", ["knorm", "snapkv", "expected", "h2o"])
def test_columns_say_what_single_plans_say(model: Path, policy: str) -> None:
    """Who wants log-probabilities is planned alone in every step; who does not, only where it is to prune."""
    told = {}
    for logprobs in (None, 0):
        serving = Serving(model)
        steps = watched_steps(serving)
        for index in range(3):
            how = params(policy, every=EVERY)
            serving.submit(f"{index}", prompt(31 + index), how, max_tokens=OUTPUT, logprobs=logprobs)
        serving.run()
        told[logprobs] = dict(serving.tokens)
        assert len(told[logprobs]) == 3
        rows, pruned = sum(rows for rows, _ in steps), sum(count for _, count in steps)
        assert pruned >= 3 * (OUTPUT // EVERY)
        # Of each period one step orders the prune and is planned alone.
        assert rows == 0 if logprobs == 0 else rows >= 3 * OUTPUT * (EVERY - 2) // EVERY
    assert told[None] == told[0]


def test_without_prunes_while_decoding_it_is_like_any_other(model: Path) -> None:
    serving = Serving(model)
    steps = watched_steps(serving)
    serving.submit("a", prompt(31), params("knorm", every=0), max_tokens=OUTPUT, logprobs=None)
    serving.run()
    # The prompt's end gives the first token, and the next step compacts.
    assert sum(rows for rows, _ in steps) == OUTPUT - 1


@pytest.mark.parametrize("policy", ["knorm", "tova", "ada"])
def test_a_neighbour_that_prunes_changes_no_bit(model: Path, policy: str) -> None:
    """In float32 a row's sums do not depend on what the other rows of the batch are."""
    how = params("knorm", budget="ada", every=EVERY) if policy == "ada" else params(policy, every=EVERY)
    said = []
    for prune in (None, how):
        serving = Serving(model)
        serving.submit("plain", prompt(30), None, max_tokens=OUTPUT)
        serving.submit("other", prompt(33), prune, max_tokens=OUTPUT, logprobs=None)
        serving.run()
        assert (serving.last["other", 0].cache is not None) == (prune is not None)
        said.append((serving.tokens["plain", 0], torch.tensor(serving.logprobs["plain", 0])))
    assert said[0][0] == said[1][0]
    assert torch.equal(said[0][1], said[1][1])
