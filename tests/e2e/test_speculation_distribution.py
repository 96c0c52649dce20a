"""Unseeded sampling with a draft model through scheduler and engine follows the exact joint distribution of tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Tokens, single_events
from quire.core.request import Request, SamplingParams
from quire.models.context import AttentionContext
from quire.scheduler.loop import EngineLoop, scheduler_config
from quire.scheduler.scheduler import Scheduler
from quire.speculation.draft_cache import DraftLayout
from quire.speculation.model import ModelDrafter

from ..engine.harness import make_engine
from ..engine.test_speculative_sampling import DRAFTS, FIRST, RUN, Bigrams, p_value
from ..models.conftest import CPU

CHOICES, REQUESTS, SLOTS = 128, 20, 500


class Draft(Bigrams):
    """Another table of bigrams."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, context: AttentionContext, logit_rows: Tensor
    ) -> Tensor:
        return self.table[input_ids[logit_rows]]


def generate(params: SamplingParams, name: str) -> tuple[list[tuple[int, ...]], float]:
    """The tokens of many choices, and the share of drafts that were right."""
    target = Bigrams()
    engine = make_engine(target, max_num_seqs=SLOTS, max_batch_tokens=4 * SLOTS, page_size=16, max_model_len=20)
    drafter = ModelDrafter(Draft(DRAFTS[name]), DraftLayout(SLOTS, 20, 16, 20 * SLOTS), CPU, target)
    engine.draft_with(drafter, EngineConfig(model="m", draft="draft", draft_tokens=2))
    config = scheduler_config(engine.info, max_num_seqs=SLOTS, max_batch_tokens=4 * SLOTS, max_waiting=5000)
    loop = EngineLoop(engine, Scheduler(config))
    for number in range(REQUESTS):
        loop.submit(Request(id=RequestId(str(number)), prompt_ids=(FIRST,), params=params, seed=977 * number + 5))
    runs: dict[tuple[str, int], tuple[int, ...]] = {}
    while loop.has_work:
        for event in single_events(loop.step().events):
            if isinstance(event, Tokens):
                key = event.request_id, event.index
                runs[key] = (*runs.get(key, ()), *event.token_ids)
    counts = loop.stats().speculation
    assert counts.draft_tokens >= len(runs) == REQUESTS * CHOICES
    return list(runs.values()), counts.accepted_tokens / counts.draft_tokens


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.75, "frequency_penalty": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["good", "bad"])
def test_choices_follow_the_joint_distribution(settings: dict[str, Any], name: str) -> None:
    params = SamplingParams(n=CHOICES, max_tokens=RUN, ignore_eos=True, **settings)
    torch.manual_seed(0)
    runs, right = generate(params, name)
    # Fixed seeds: the p-value is always the same, and below this for one correct rule in a thousand.
    assert p_value(params, runs) > 1e-3
    assert 0 < right < 1
