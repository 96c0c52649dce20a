"""Log-probabilities that requests ask for: of generated tokens, and of their prompts'."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..core.plan import BatchPlan, TokenLogprob
from ..kernels import sampling
from ..kernels.backend import Backend
from .inputs import LogitLayout
from .slots import SlotTable
from .staging import upload
from .trees import accepted_rows


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Log-probabilities wanted of one row of logits."""

    sequence: int
    row: int
    """Of the logits."""
    token: int
    top: int
    of_prompt: bool


def told_logprobs(
    logits: Tensor,
    plan: BatchPlan,
    layout: LogitLayout,
    accepted: Sequence[tuple[int, ...]],
    table: SlotTable,
    backend: Backend,
) -> dict[tuple[int, bool], list[TokenLogprob]]:
    """Log-probabilities under the raw logits [R, V], by (sequence of the plan, of its prompt?), in order.

    accepted: tokens of each of the layout's samplers. The host waits for the device where anybody asks.
    """
    wanted = _wanted(plan, layout, accepted, table)
    results: dict[tuple[int, bool], list[TokenLogprob]] = {}
    if not wanted:
        return results
    places = upload(np.array([[one.row for one in wanted], [one.token for one in wanted]], np.int64), table.device)
    rows, tokens = places[0], places[1]
    chosen, ids, values = sampling.token_logprobs(logits[rows], tokens, max(one.top for one in wanted), backend)
    parts = (chosen.tolist(), ids.tolist(), values.tolist())
    for one, logprob, top_ids, top_values in zip(wanted, *parts, strict=True):
        top = tuple(zip(top_ids[: one.top], top_values[: one.top], strict=True))
        results.setdefault((one.sequence, one.of_prompt), []).append(TokenLogprob(one.token, logprob, top))
    return results


def _wanted(
    plan: BatchPlan, layout: LogitLayout, accepted: Sequence[tuple[int, ...]], table: SlotTable
) -> list[_Wanted]:
    """Of accepted tokens, where asked for, and of scored prompt tokens."""
    wanted = []
    for index, first, tokens in zip(layout.samplers, layout.sampler_rows, accepted, strict=True):
        top = table.states[plan.sequences[index].slot].params.logprobs
        if top is not None:
            for row, token in zip(accepted_rows(plan.sequences[index], tokens), tokens, strict=True):
                wanted.append(_Wanted(index, first + row, token, top, of_prompt=False))
    for index, first in layout.scored:
        top = table.states[plan.sequences[index].slot].params.prompt_logprobs or 0
        for offset, token in enumerate(plan.sequences[index].score_ids):
            wanted.append(_Wanted(index, first + offset, token, top, of_prompt=True))
    return wanted
