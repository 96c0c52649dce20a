"""The shipped draft goes with the shipped model: it loads beside it, and most of what it says is accepted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from quire.core.request import SamplingParams
from quire.distill.acceptance import Tally, chain_tally, greedy_matches, sampled_tally
from quire.distill.corpus import Corpus
from quire.distill.draft_init import Init, load_model, make_draft
from quire.distill.recall import RecallTrials
from quire.distill.samples import SampleMaker
from quire.distill.target_rows import Logits
from quire.models.loading import load_runner, weight_bytes
from quire.models.placement import Placement
from quire.server.llm import LLM

CPU = torch.device("cpu")
WINDOWS = 8


def logits_of(model: PreTrainedModel) -> Logits:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def target(shipped: Path) -> PreTrainedModel:
    return load_model(str(shipped), torch.float32)


@pytest.fixture(scope="module")
def draft(shipped: Path, target: PreTrainedModel) -> PreTrainedModel:
    return make_draft(Init(str(shipped / "draft")), target, [])


def windows(corpus: Corpus) -> list[list[int]]:
    """Stretches of code that neither model was trained on."""
    starts = np.linspace(0, len(corpus.held_out) - 257, WINDOWS).astype(int)
    return [corpus.held_out[start : start + 256].tolist() for start in starts]


@pytest.fixture(scope="module")
def undistilled(corpus: Corpus, target: PreTrainedModel, draft: PreTrainedModel) -> PreTrainedModel:
    """The cut of the target that the shipped draft began as."""
    text = draft.config
    init = Init("layers:0,1", text.intermediate_size, False, text.num_key_value_heads, text.hidden_size)
    cut = make_draft(init, target, [torch.tensor([ids]) for ids in windows(corpus)])
    assert [p.shape for p in cut.parameters()] == [p.shape for p in draft.parameters()]
    return cut


def test_it_is_a_small_model_of_its_own(shipped: Path, draft: PreTrainedModel) -> None:
    place = Placement(CPU, torch.float32, "reference")
    options = {"place": place, "runner": "auto", "trust_remote_code": False, "on_progress": lambda *_: None}
    target = load_runner(str(shipped), **options)  # type: ignore[arg-type]
    runner = load_runner(str(shipped / "draft"), **options, target=target)  # type: ignore[arg-type]
    assert weight_bytes(runner, target) == sum(4 * p.numel() for p in draft.parameters())
    assert weight_bytes(runner, target) < 0.3 * weight_bytes(target, None)
    assert sum(path.stat().st_size for path in (shipped / "draft").iterdir()) < 8_500_000


def test_it_speaks_as_its_target_does(
    corpus: Corpus, target: PreTrainedModel, draft: PreTrainedModel, undistilled: PreTrainedModel
) -> None:
    tally, before = Tally(), Tally()
    for ids in windows(corpus):
        tally += sampled_tally(logits_of(target), logits_of(draft), ids, 1.0, CPU)
        before += sampled_tally(logits_of(target), logits_of(undistilled), ids, 1.0, CPU)
    assert tally.acceptance > 0.52 and tally.acceptance > 1.25 * before.acceptance


def test_greedy_chains_of_four_are_long(
    shipped: Path, corpus: Corpus, draft: PreTrainedModel, undistilled: PreTrainedModel
) -> None:
    llm = LLM(str(shipped), device="cpu", max_model_len=512)
    tally, before = Tally(), Tally()
    greedy = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    for done in llm.generate(windows(corpus), greedy, progress=False):
        for model, one in ((draft, tally), (undistilled, before)):
            one += chain_tally(greedy_matches(logits_of(model), done.prompt_ids, done.choices[0].token_ids, CPU), 4)
    assert tally.accepted_length >= 2.5 and tally.accepted_length >= 1.25 * before.accepted_length


def test_it_still_looks_back(corpus: Corpus, maker: SampleMaker, draft: PreTrainedModel) -> None:
    trials = RecallTrials(corpus, maker, seed=7)
    rng = np.random.default_rng(7)
    made = [trials.recall_trial(rng, 256, 1) for _ in range(20)]
    share = trials.exact(lambda ids, last: logits_of(draft)(ids)[:, -last:].detach(), made, whole=True)
    assert share >= 0.5
