"""`Pace`: how much prompt a step takes, so that those who decode in it need not wait long for their next token."""

import sys

from ..core.plan import BatchPlan, StepOutput
from .step_cost import StepCost

MIN_CHUNK = 16
"""Prompt tokens that a step takes however tight its time is: shorter chunks read the cache too often."""


class Pace:
    """Keeps steps that decode within a target of time, by what steps have cost so far."""

    def __init__(self, target: float | None, page_size: int) -> None:
        """target: seconds; None: no limit, and nothing is learnt."""
        self._target = target
        self._least = -(-MIN_CHUNK // page_size) * page_size
        self._cost = StepCost()

    def prompt_tokens(self, decodes: int) -> int:
        """Most prompt tokens that a step with so many decodes should take."""
        if self._target is None or not decodes:
            return sys.maxsize
        return self._cost.prompt_tokens_within(self._target, decodes, self._least)

    def learn(self, plan: BatchPlan, output: StepOutput) -> None:
        """Take in what a step cost; a part of one token costs as much as a decode, a draft token too."""
        if self._target is None:
            return
        decodes = len(plan.decodes) + sum(len(part.token_ids) == 1 for part in plan.sequences)
        drafted = sum(result.drafted for result in output.sequences)
        seconds = output.forward_seconds + output.sample_seconds
        self._cost.learn(plan.num_tokens - decodes, decodes + drafted, seconds)
