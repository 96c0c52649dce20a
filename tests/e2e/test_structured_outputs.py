"""Structured outputs together with all else that happens to requests: each holds to its grammar, and is told the same
with drafts and without, alone and among others.

Scheduler, engine, runner, drafter and grammars are real, the model tiny and random, in float32.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from quire.core.pruning import PruneParams
from quire.core.request import Grammar, Request
from quire.scheduler.swap import SwapCosts
from quire.server.grammars import structured_outputs

from ..server.conftest import byte_level_backend
from .speculating import Run, Stack, assert_equal, request, save, save_like
from .test_parity import GQA
from .test_prefix import tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zé]{0,4}$"},
        "age": {"type": "integer", "minimum": -9, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "no, never", "peut-être 😀"]
DATE = r"(19|20)[0-9]{2}-[01][0-9]"
SUMS = 'start: sum\nsum: number | "(" sum "+" sum ")"\nnumber: /[0-9]{1,2}/'
SHARED = tokens(37, seed=1)


def is_person(text: str) -> bool:
    person = json.loads(text)
    known = {"name", "age"} <= person.keys() <= {"name", "age", "tags"}
    return known and re.fullmatch("[a-zé]{0,4}", person["name"]) is not None and -9 <= person["age"] <= 120


Kind = tuple[dict[str, Any], dict[str, Any], Callable[[str], Any]]
KINDS: dict[str, Kind] = {
    "person": ({"json": SCHEMA}, {"temperature": 0.0}, is_person),
    "hot person": ({"json": SCHEMA}, {"temperature": 3.0}, is_person),
    "penalised person": ({"json": SCHEMA}, {"presence_penalty": 1.5, "repetition_penalty": 1.3}, is_person),
    "scored person": ({"json": SCHEMA}, {"logprobs": 2, "prompt_logprobs": 1, "top_p": 0.9}, is_person),
    "dates": ({"regex": DATE}, {"n": 3, "temperature": 1.4}, re.compile(DATE).fullmatch),
    "at least": ({"regex": "[a-z]*"}, {"min_tokens": 5, "max_tokens": 9}, re.compile("[a-z]{5,}").fullmatch),
    "no end": ({"regex": "[a-z]{3,7}"}, {"ignore_eos": True}, re.compile("[a-z]{7}").fullmatch),
    "choice": ({"choice": CHOICES}, {"temperature": 5.0, "top_k": 40}, CHOICES.__contains__),
    "sums": ({"grammar": SUMS}, {"logit_bias": {8: -3.0}, "temperature": 0.7}, lambda text: eval(text) >= 0),
}
FREE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"top_p": 0.8, "temperature": 1.4, "logprobs": 1},
    "long": {"temperature": 0.0, "max_tokens": 150},
}


def bound(name: str, number: int = 0, seeded: bool = True, **settings: Any) -> Request:
    outputs, params, _ = KINDS[name]
    own: dict[str, Any] = {"max_tokens": 140, "ignore_eos": False, "grammar": structured_outputs(outputs)}
    prompt = (*SHARED[: 9 * (number % 5)], *tokens(3 + number, seed=number))
    return request(name, prompt, seed=number, seeded=seeded, **own | params | settings)


def requests(seeded: bool = True, **settings: Any) -> list[Request]:
    """One of each kind, and neighbours that are bound to nothing; seeded: as their users wish."""
    free = [request(n, tokens(9, seed=i), seed=i, seeded=seeded, **p) for i, (n, p) in enumerate(FREE.items())]
    all_bound = [bound(name, number, seeded, **settings) for number, name in enumerate(KINDS)]
    return [*all_bound[:3], *free[:2], *all_bound[3:], *free[2:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary of 310 tokens, in a model that has a few more."""
    config = transformers.LlamaConfig(**GQA | {"vocab_size": 325, "eos_token_id": 1, "bos_token_id": 0})
    folder = save(tmp_path_factory.mktemp("llama"), config)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text_of(folder: Path) -> Callable[[list[int]], str]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda ids: backend.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return Stack(folder, swap_memory=2**21, max_model_len=256)


def check(run: Run, text_of: Callable[[list[int]], str]) -> None:
    """Whoever is bound ended in time, and is what it was to be."""
    for name, (_, params, holds) in KINDS.items():
        for index in range(params.get("n", 1)):
            choice = run.told[name, index]
            ends = {"stop", "length"} if name == "at least" else {"stop"}
            assert choice.end in ends, (name, choice)
            assert holds(text_of(choice.tokens)), (name, text_of(choice.tokens))


@pytest.fixture(scope="module")
def plain(stack: Stack, text_of: Callable[[list[int]], str]) -> Run:
    """Without drafts, one after the other."""
    run = stack.serve(requests(), num_host_pages=0, prefix_cache=False, max_num_seqs=1)
    check(run, text_of)
    return run


@pytest.fixture(scope="module")
def drafts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    like = str(save_like(tmp_path_factory.mktemp("like"), folder))
    return {"nobody": "", "ngram": "ngram", "layerskip": "layerskip:2", "like": like}


SCENES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small chunks": {"max_batch_tokens": 13},
    "looking ahead": {"looks_ahead": True},
    "recomputed": {"num_host_pages": 0},
    "swapped": {},
}
TURNS = [
    ("nobody", "roomy"),
    ("nobody", "looking ahead"),
    ("nobody", "swapped"),
    ("ngram", "recomputed"),
    ("layerskip", "small chunks"),
    ("like", "roomy"),
    ("like", "recomputed"),
    ("like", "swapped"),
]


@pytest.mark.parametrize(("name", "scene"), TURNS, ids=map(" ".join, TURNS))
def test_requests_are_told_the_same(
    stack: Stack, plain: Run, drafts: dict[str, str], name: str, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)
    changes: dict[str, Any] = dict(SCENES[scene])
    short = scene in ("recomputed", "swapped")
    if short:
        changes["num_pages"] = 50 * stack.rows
    draft = stack.draft(drafts[name]) if drafts[name] else None
    run = stack.serve(requests(), draft, **changes)
    assert_equal(run.told, plain.told)
    stats = run.loop.stats()
    assert (stats.preemptions_total > 0) == short
    assert (stats.swap_in_sequences_total > 0) == (scene == "swapped")
    assert (run.ahead > 0) == (scene == "looking ahead")
    assert stats.prefix_hits_total > 0 and stats.grammar_seconds_total > 0
    if name == "like":
        assert run.counts.accepted_tokens > 100


@pytest.mark.parametrize("name", ["nobody", "ngram", "like"])
def test_forced_tokens_change_nothing(
    stack: Stack, plain: Run, drafts: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = stack.draft(drafts[name]) if drafts[name] else None
    most = max(choice.most_at_once for choice in stack.serve(requests(), draft).told.values())
    monkeypatch.setattr("quire.engine.grammar.MAX_FORCED_TOKENS", 0)
    run = stack.serve(requests(), draft)
    assert_equal(run.told, plain.told)
    assert most > 5 >= max(choice.most_at_once for choice in run.told.values())


def test_trees_become_chains(stack: Stack, plain: Run, drafts: dict[str, str]) -> None:
    run = stack.serve(requests(), stack.draft(drafts["like"], trees=True))
    assert_equal(run.told, plain.told)
    assert run.counts.accepted_tokens > 50


@pytest.mark.parametrize("name", ["ngram", "like"])
def test_what_is_drawn_freely_holds_to_its_grammar(
    stack: Stack, drafts: dict[str, str], name: str, text_of: Callable[[list[int]], str]
) -> None:
    """Nobody asks for a seed: drafts are judged, and decide what is drawn."""
    check(stack.serve(requests(seeded=False), stack.draft(drafts[name])), text_of)


@pytest.mark.parametrize("policy", ["snapkv", "window", "keydiff"])
def test_whose_cache_is_pruned_holds_to_its_grammar(
    stack: Stack, drafts: dict[str, str], policy: str, text_of: Callable[[list[int]], str]
) -> None:
    prune = PruneParams(policy=policy, keep=0.5, window=4, sinks=2, floor=8)
    runs = [
        stack.serve(requests(prune=prune), stack.draft(drafts[name]) if drafts[name] else None)
        for name in ("nobody", "like")
    ]
    for run in runs:
        check(run, text_of)
    assert_equal(runs[1].told, runs[0].told)


def test_neighbours_are_told_the_same(stack: Stack, plain: Run) -> None:
    alone = stack.serve([item for item in requests() if item.grammar is None])
    for key, choice in alone.told.items():
        assert (choice.tokens, choice.end) == (plain.told[key].tokens, plain.told[key].end)


def test_who_is_cancelled_leaves_nothing_behind(stack: Stack, plain: Run, drafts: dict[str, str]) -> None:
    aborts = {name: lambda choice: len(choice.tokens) >= 3 for name in ("person", "scored person", "no end")}
    run = stack.serve(requests(), stack.draft(drafts["like"]), aborts)
    for gone in aborts:
        assert run.told.pop((gone, 0)).end is None
    assert_equal(run.told, plain.told, exactly=False)


def test_who_cannot_be_bound_is_told(stack: Stack) -> None:
    broken = Grammar("regex", '{"grammars": [{"lark_grammar": "start: /(/"}]}')
    run = stack.serve([request("broken", [5, 6], grammar=broken), bound("dates")])
    assert run.told["broken", 0].end == "InvalidRequestError"
    assert run.told["dates", 2].end == "stop"


def test_a_length_may_cut_it_short(stack: Stack, plain: Run) -> None:
    run = stack.serve([bound("person", 0, max_tokens=5)])
    choice = run.told["person", 0]
    assert choice.end == "length" and choice.tokens == plain.told["person", 0].tokens[:5]
