"""Scorers: a trial, what the pruned model gave, and what the unpruned one gave -> a number. Exact, no judging."""

from collections.abc import Callable

from .trial import Completion, Trial

Scorer = Callable[[Trial, Completion, Completion], float]


def answered(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """1 if the answer was generated: the first line is it, nothing before, nothing after."""
    line = got.choices[0].text.strip(" ").partition("\n")[0]
    return float(line.rstrip(" .") == trial.answer)


def recalled(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """Share of the answers all of whose tokens were the most likely ones."""
    hits = [all(_hits(got, span)) for span in trial.spans]
    return sum(hits) / len(hits)


def recalled_all(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """1 if each token of each answer was the most likely one."""
    return float(recalled(trial, got, unpruned) == 1.0)


def copied(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """Share of the tokens that were the most likely ones."""
    hits = [hit for span in trial.spans for hit in _hits(got, span)]
    return sum(hits) / len(hits)


def log_loss(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """Mean negative log-probability, nats per token."""
    losses = [-got.prompt_logprobs[i - 1].logprob for start, end in trial.spans for i in range(start, end)]
    return sum(losses) / len(losses)


def agreeing(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """Share of places at which the token generated is the unpruned model's."""
    pairs = list(zip(got.choices[0].token_ids, unpruned.choices[0].token_ids, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def agreeing_from_start(trial: Trial, got: Completion, unpruned: Completion) -> float:
    """Share of the output before it first differs from the unpruned model's."""
    pairs = list(zip(got.choices[0].token_ids, unpruned.choices[0].token_ids, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)) / len(pairs)


def _hits(got: Completion, span: tuple[int, int]) -> list[bool]:
    entries = [got.prompt_logprobs[i - 1] for i in range(*span)]
    return [entry.top[0][0] == entry.token_id for entry in entries]
