"""A draft model takes another's place while sequences generate: what they say stays the target's own."""

import gc
import queue
import weakref
from pathlib import Path
from typing import Any

import pytest
import transformers

from quire.core.config import EngineConfig
from quire.core.messages import DraftRefused, DraftReplaced, single_events
from quire.core.request import Request
from quire.engine import draft_swap
from quire.scheduler.client import load_in_process
from quire.scheduler.draft_swap import FetchedDraft, fetch_draft, replace_draft
from quire.scheduler.loop import EngineLoop
from quire.speculation import model as drafting

from .speculating import request, save
from .test_parity import GQA

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target; a draft of one layer that knows nothing of it; one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": save(folder / "target", transformers.LlamaConfig(**GQA)),
        "poor": save(folder / "poor", transformers.LlamaConfig(**GQA | {"num_hidden_layers": 1}), seed=9),
        "foreign": save(folder / "foreign", transformers.LlamaConfig(**GQA | {"vocab_size": 50})),
    }


def config_of(models: dict[str, Path], draft: str) -> EngineConfig:
    return EngineConfig(
        model=str(models["target"]), draft=draft, draft_tokens=4, device="cpu", dtype="float32", page_size=4,
        max_num_seqs=4, max_batch_tokens=48, kv_memory=2**20, max_model_len=160,
    )  # fmt: skip


def loop_of(config: EngineConfig) -> EngineLoop:
    return load_in_process(config)


def asked(speculate: bool = True) -> list[Request]:
    """Greedy and seeded."""
    more: dict[str, Any] = {"max_tokens": 40, "speculate": speculate}
    return [
        request("greedy", PROMPT, temperature=0.0, **more),
        request("seeded", PROMPT[::-1], temperature=0.9, top_p=0.95, **more),
    ]


class Served:
    """Requests on their way through a loop."""

    def __init__(self, loop: EngineLoop, requests: list[Request]) -> None:
        self.loop = loop
        self.texts: dict[str, list[int]] = {request.id: [] for request in requests}
        for one in requests:
            loop.submit(one)

    def steps(self, count: int) -> None:
        for _ in range(count):
            for event in single_events(self.loop.step().events):
                self.texts[event.request_id] += getattr(event, "token_ids", [])
            self.loop.scheduler.check_integrity()

    def to_the_end(self) -> dict[str, list[int]]:
        while self.loop.has_work:
            self.steps(1)
        return self.texts


def swap(loop: EngineLoop, config: EngineConfig, folder: Path | str) -> DraftReplaced | DraftRefused:
    """As the engine process does it, fetching included."""
    fetched: queue.SimpleQueue[FetchedDraft] = queue.SimpleQueue()
    fetch_draft(loop, str(folder), fetched.put)
    return replace_draft(loop, config, fetched.get(timeout=60))


@pytest.mark.parametrize("prefix", ["", "ngram+"])
def test_text_is_the_same_and_the_old_draft_is_gone(models: dict[str, Path], prefix: str) -> None:
    config = config_of(models, f"{prefix}{models['poor']}")
    loop = loop_of(config)
    alone = Served(loop, asked(speculate=False)).to_the_end()
    engine: Any = loop.engine
    drafter = engine._speculation.drafter
    model = drafter.model if prefix else drafter
    old = weakref.ref(model._model), weakref.ref(model.cache.pool)
    served = Served(loop, asked())
    served.steps(6)
    before, held, scheduled = loop.stats().speculation, engine.info.draft, loop.scheduler.speculation
    assert before.drafts and scheduled is not None
    assert all(len(text) < 40 for text in served.texts.values())
    rows = scheduled.lengths.costs.rows
    answer = swap(loop, config, models["target"])  # the best draft of all
    assert isinstance(answer, DraftReplaced) and answer.draft == engine.info.draft
    gc.collect()
    assert [part() for part in old] == [None, None], "its memory is given back"
    assert answer.draft.name == f"{prefix}{models['target']}" and answer.draft.method == held.method
    assert answer.draft.num_bytes == drafter.num_bytes > held.num_bytes
    assert answer.draft.costs.rows == held.costs.rows and answer.draft.costs.drafts
    model_source = scheduled.lengths.sources.model
    assert model_source is not None and scheduled.lengths.costs.rows is rows
    assert not model_source.acceptance._all_tried.any(), "nothing of the old one counts"
    assert served.to_the_end() == alone
    after = loop.stats().speculation
    assert after.accepted_tokens - before.accepted_tokens > 0.5 * (after.draft_tokens - before.draft_tokens)
    assert Served(loop, asked()).to_the_end() == alone


def test_one_that_cannot_be_used_changes_nothing(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(models, str(models["target"]))
    loop = loop_of(config)
    held = loop.engine.info.draft
    alone = Served(loop, asked(speculate=False)).to_the_end()
    served = Served(loop, asked())
    served.steps(1)

    def refused(folder: Path | str, why: str) -> None:
        answer = swap(loop, config, folder)
        assert isinstance(answer, DraftRefused) and loop.engine.info.draft == held
        assert answer.error.kind == "InvalidRequestError" and answer.error.param == "draft"
        assert why in answer.error.message and "\n" not in answer.error.message
        served.steps(1)

    refused("/no/such/folder", "not a folder")
    refused("a" * 5000, "name too long")  # as the system says of a name; it must be told like any other
    refused(models["target"].parent, "config.json")
    refused(models["foreign"], "50 tokens")
    with monkeypatch.context() as patch:
        patch.setattr(draft_swap, "_costs", _fails)
        refused(models["poor"], "cannot be run: too bad")
    with monkeypatch.context() as patch:
        patch.setattr(draft_swap, "load_draft", lambda *_: dict[str, None]()["bad"])
        refused(models["poor"], "cannot be loaded: 'bad'")
    whole = drafting.DraftCache

    def short(layout: Any, spec: Any, place: Any) -> Any:
        return _fails() if spec.num_layers == 1 else whole(layout, spec, place)

    monkeypatch.setattr(drafting, "DraftCache", short)
    refused(models["poor"], "could not be allocated: too bad")
    before = loop.stats().speculation
    assert served.to_the_end() == alone
    after = loop.stats().speculation
    right = after.accepted_tokens - before.accepted_tokens
    assert right > 0.9 * (after.draft_tokens - before.draft_tokens) > 0, "the old one drafts on, as well as before"


def _fails(*_: object) -> Any:
    raise RuntimeError("too bad\nand more")


@pytest.mark.parametrize("draft", ["ngram", "auto"])
def test_n_grams_take_up_a_model_and_give_it_back(models: dict[str, Path], draft: str) -> None:
    """`auto` finds no model here. The cycle of the prompt is one that n-grams know."""
    config = config_of(models, draft)
    loop = loop_of(config)
    alone = Served(loop, asked(speculate=False)).to_the_end()
    engine: Any = loop.engine
    held = engine.info.draft
    assert (held.method, held.name) == ("ngram", "ngram")
    served = Served(loop, asked())
    served.steps(6)
    added = swap(loop, config, models["target"])
    assert isinstance(added, DraftReplaced) and added.draft == engine.info.draft and added.draft.costs.drafts
    assert (added.draft.method, added.draft.name) == ("hybrid", f"ngram+{models['target']}")
    model = weakref.ref(engine._speculation.drafter.model)
    before = loop.stats().speculation
    served.steps(4)
    after = loop.stats().speculation
    assert after.accepted_tokens - before.accepted_tokens > 0.5 * (after.draft_tokens - before.draft_tokens) > 0
    assert all(len(text) < 40 for text in served.texts.values())
    given_back = swap(loop, config, "ngram")
    gc.collect()
    assert isinstance(given_back, DraftReplaced) and model() is None, "its memory is given back"
    assert (given_back.draft.method, given_back.draft.name, given_back.draft.costs.drafts) == ("ngram", "ngram", [])
    assert served.to_the_end() == alone
    assert isinstance(swap(loop, config, "ngram"), DraftReplaced), "nothing to give back"
    assert Served(loop, asked()).to_the_end() == alone


def test_a_model_that_n_grams_cannot_take_up_changes_nothing(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(models, "ngram")
    loop = loop_of(config)
    alone, held = Served(loop, asked(speculate=False)).to_the_end(), loop.engine.info.draft
    served = Served(loop, asked())
    served.steps(3)
    for folder, why in ((models["foreign"], "50 tokens"), (models["poor"], "cannot be run: too bad")):
        with monkeypatch.context() as patch:
            patch.setattr(draft_swap, "_costs", _fails)
            answer = swap(loop, config, folder)
        assert isinstance(answer, DraftRefused) and why in answer.error.message and loop.engine.info.draft == held
        served.steps(1)
    monkeypatch.setattr(drafting, "DraftCache", _fails)
    answer = swap(loop, config, models["poor"])
    assert isinstance(answer, DraftRefused) and "could not be allocated: too bad" in answer.error.message
    assert served.to_the_end() == alone


@pytest.mark.parametrize("draft", ["none", "layerskip:1"])
def test_there_must_be_a_drafter_that_takes_one(models: dict[str, Path], draft: str) -> None:
    config = config_of(models, draft)
    for folder in (models["poor"], "ngram"):
        answer = swap(loop_of(config), config, folder)
        assert isinstance(answer, DraftRefused) and "no draft model can be used" in answer.error.message


def test_a_model_alone_cannot_be_given_back(models: dict[str, Path]) -> None:
    config = config_of(models, str(models["poor"]))
    answer = swap(loop_of(config), config, "ngram")
    assert isinstance(answer, DraftRefused) and "no n-grams draft" in answer.error.message
