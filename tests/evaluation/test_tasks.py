"""Trials: lengths met, answers in the context once, the same for the same seed; scorers on right and wrong answers."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from quire.core.config import embedded_model
from quire.core.errors import InvalidRequestError
from quire.core.messages import Logprob
from quire.evaluation.material import Material
from quire.evaluation.scoring import (
    agreeing,
    agreeing_from_start,
    answered,
    copied,
    log_loss,
    recalled,
    recalled_all,
)
from quire.evaluation.sweep import Sweep
from quire.evaluation.tasks import CONTINUED, GENERATED, HOPS, KEYS, QUERIES, TASKS, Place
from quire.evaluation.trial import Trial
from quire.server.text import Tokenizer

CHUNK = 128


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Answer:
    """A completion as the scorers see it."""

    choices: list[Choice]
    prompt_logprobs: list[Logprob] = field(default_factory=list)


def told(text: str = "", ids: tuple[int, ...] = ()) -> Answer:
    return Answer([Choice(text, list(ids))])


def judged(likely: list[int], prompt: list[int], logprob: float = -0.5) -> Answer:
    """What a model thinks of `prompt` if `likely[i]` is what it expects at position i."""
    pairs = list(zip(likely, prompt, strict=True))[1:]
    return Answer([Choice()], [Logprob(token, logprob, [(best, -0.1)]) for best, token in pairs])


@pytest.fixture(scope="module", params=["code", "prose"])
def material(request: pytest.FixtureRequest) -> Material:
    return Material(Tokenizer.load(str(embedded_model())), request.param)


def trial_of(material: Material, task: str, length: int = 600, index: int = 0) -> Trial:
    return TASKS[task].make(material, np.random.default_rng(index), Place(index, length, CHUNK))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.tail])
def test_prompts_with_a_generated_answer_have_the_length(material: Material, task: str) -> None:
    for length in (500, 777):
        trial = trial_of(material, task, length)
        assert len(trial.prompt) == length and not trial.spans
        assert trial.params.prompt_logprobs is None and trial.params.max_tokens == trial.max_tokens


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.tail])
def test_scored_tails_begin_with_a_chunk(material: Material, task: str) -> None:
    trial = trial_of(material, task, 777)
    first = trial.spans[0][0]
    assert len(trial.prompt) <= 777 and trial.params.prompt_logprobs == 1
    boundary = first // CHUNK * CHUNK
    assert 0 < boundary < first, "the first scored token is not predicted from the unpruned chunk"
    assert trial.spans[-1][1] - boundary <= max(CHUNK, CONTINUED) and trial.spans[-1][1] == len(trial.prompt)


def test_needle_stands_once_at_its_depth(material: Material) -> None:
    decode = material.tokenizer.decode
    places = []
    for index in range(5):
        trial = trial_of(material, "needle", 1500, index)
        text = decode(trial.prompt)
        assert text.count(trial.answer) == 1
        name = text.rsplit("\n", 1)[1]
        assert text.count(name) == 2 and text.index(name) < text.index(trial.answer)
        places.append(text.index(trial.answer) / len(text))
    assert places == sorted(places) and places[0] < 0.1 and places[4] > 0.9


def test_keys_queries_and_chains_can_be_answered_from_the_context(material: Material) -> None:
    decode = material.tokenizer.decode
    trial = trial_of(material, "multi-key", 1000)
    assert decode(trial.prompt).count(trial.answer) == 1
    for task, count in (("multi-query", QUERIES), ("variables", HOPS)):
        trial = trial_of(material, task, 1000)
        assert len(trial.spans) == count
        context = decode(trial.prompt[: trial.spans[0][0] // CHUNK * CHUNK])
        answers = [decode(trial.prompt[start:end]).strip() for start, end in trial.spans]
        assert len(set(answers)) == count and all(answer in context for answer in answers)
        lines = decode(trial.prompt)[len(context) :].strip().split("\n")
        assert all(context.count(line) == 1 for line in lines)
    assert KEYS > QUERIES
    heads = [line.removesuffix(answer) for line, answer in zip(lines, answers, strict=True)]
    assert all(answer in head for answer, head in zip(answers, heads[1:], strict=False)), "each hop asks for the next"


def test_copied_block_stands_in_the_context(material: Material) -> None:
    trial = trial_of(material, "copying", 700)
    ((start, end),) = trial.spans
    block = trial.prompt[start:end]
    context = trial.prompt[: start // CHUNK * CHUNK]
    assert any(context[i : i + len(block)] == block for i in range(len(context)))


def test_sums_are_right_and_the_asked_one_is_new(material: Material) -> None:
    trial = trial_of(material, "arithmetic", 1000)
    text = material.tokenizer.decode(trial.prompt)
    first, _, second = text.rsplit("\n", 1)[1].replace("assert ", "").rstrip(" =").split(" ")
    assert int(first) + int(second) == int(trial.answer)
    assert f"= {trial.answer}\n" not in text


def test_the_same_seed_gives_the_same_trials(material: Material) -> None:
    def prompts(seed: int, samples: int) -> list[list[int]]:
        sweep = Sweep([], ["needle"], [500], samples, CHUNK, seed)
        return [trial.prompt for trial in sweep.trials(material, "needle", 500)]

    assert prompts(3, 4)[:2] == prompts(3, 2) != prompts(4, 2)


def test_too_short_a_prompt_is_refused(material: Material) -> None:
    with pytest.raises(InvalidRequestError, match="too few"):
        trial_of(material, "multi-query", CHUNK)
    with pytest.raises(InvalidRequestError, match="too few"):
        trial_of(material, "loss", CHUNK)
    with pytest.raises(InvalidRequestError, match="unknown task 'juggling'; known: needle"):
        Sweep([], ["juggling"], [500], 1, CHUNK)
    with pytest.raises(InvalidRequestError, match="at least 1 sample"):
        Sweep([], ["needle"], [500], 0, CHUNK)


def test_generated_answers_must_be_exact() -> None:
    trial = Trial([1, 2], 4, answer="12345")
    for text, right in (
        (" 12345\nx = 1", 1),
        (" 12345.\n", 1),
        ("12345", 1),
        (" 123456", 0),
        (" 1234", 0),
        ("\n12345", 0),
    ):
        assert answered(trial, told(text), told()) == right


def test_recall_wants_every_token_of_an_answer() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    trial = Trial(prompt, 1, spans=((1, 3), (4, 6)))
    for likely, share in (([0, 2, 3, 0, 5, 6], 1.0), ([0, 2, 9, 0, 5, 6], 0.5), ([0, 9, 3, 4, 5, 9], 0.0)):
        got = judged(likely, prompt)
        assert recalled(trial, got, got) == share
        assert recalled_all(trial, got, got) == float(share == 1)
    assert copied(trial, judged([0, 2, 9, 0, 5, 6], prompt), told()) == 0.75


def test_loss_is_the_mean_over_the_scored_tokens() -> None:
    got = judged([0] * 4, [1, 2, 3, 4], logprob=-2.0)
    got.prompt_logprobs[2] = Logprob(4, -4.0, [(4, -4.0)])
    assert log_loss(Trial([1, 2, 3, 4], 1, spans=((2, 4),)), got, got) == 3.0


def test_agreement_counts_places_and_the_common_start() -> None:
    trial = Trial([1], GENERATED)
    got, unpruned = told(ids=(1, 2, 9, 4)), told(ids=(1, 2, 3, 4))
    assert agreeing(trial, got, unpruned) == 0.75
    assert agreeing_from_start(trial, got, unpruned) == 0.5
    assert agreeing_from_start(trial, got, got) == 1.0
