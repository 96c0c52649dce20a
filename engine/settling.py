"""What a step with drafts leaves in the cache, once it is known which of them were right; and who is computed anew.

A token that the model gives no finite values for spoils what is computed beside it: so sequences that a proposal may
have led astray are computed once more, without proposals.
"""

from collections.abc import Callable

import numpy as np

from ..core.plan import BatchPlan, Decodes, IntArray, Runs, SequenceOutput, StepOutput
from .cache import KVCache
from .expansion import without_proposals
from .launched import LaunchedStep
from .sampler import with_drafts
from .staging import upload
from .trees import staying_rows

Step = Callable[[BatchPlan], StepOutput]


def settle(launched: LaunchedStep, outputs: tuple[SequenceOutput, ...], cache: KVCache) -> None:
    """Keep of the plan's sequences with draft tokens what was right."""
    verified = [(part, output) for part, output in zip(launched.plan.sequences, outputs, strict=True) if part.drafts]
    if not verified:
        return
    stay = {part.slot: staying_rows(part, output.token_ids) for part, output in verified}
    slots, entries = np.array([*stay], np.int32), tuple(map(len, stay.values()))
    if launched.observer is not None:
        launched.observer.settle(dict(zip(stay, entries, strict=True)))
    if any(part.parents for part, _ in verified):
        cache.keep_rows(stay.keys(), stay.values())
    rows, counts = upload(np.array([slots, entries], np.int64), cache.device)
    cache.advance(rows, counts.int(), slots, entries)


def redo(
    plan: BatchPlan, outputs: tuple[SequenceOutput, ...], cache: KVCache, step: Step
) -> tuple[SequenceOutput, ...]:
    """The outputs with those of sequences that failed with draft tokens as `step` gives them without."""
    failed = [i for i, part in enumerate(plan.sequences) if part.drafts and outputs[i].error is not None]
    if not failed:
        return outputs
    for part in (plan.sequences[index] for index in failed):
        cache.wipe(part.slot, len(part.token_ids))
    again = step(BatchPlan(tuple(without_proposals(plan.sequences[index]) for index in failed)))
    redone = dict(zip(failed, again.sequences, strict=True))
    return tuple(
        with_drafts(redone[index], part) if index in redone else outputs[index]
        for index, part in enumerate(plan.sequences)
    )


def redo_rows(decodes: Decodes, decoded: IntArray, runs: Runs, cache: KVCache, step: Step) -> None:
    """The same for decodes: `decoded` and `runs` are corrected."""
    if runs.counts.all():
        return
    failed = np.flatnonzero((runs.counts == 0) & (runs.drafted > 0))
    if not len(failed):
        return
    for slot, drafted in zip(decodes.slots[failed].tolist(), runs.drafted[failed].tolist(), strict=True):
        cache.wipe(slot, 1 + drafted)
    columns = (column[failed] for column in (decodes.slots, decodes.starts, decodes.token_ids))
    found = step(BatchPlan((), decodes=Decodes(*columns))).decoded
    decoded[failed] = runs.token_ids[failed, 0] = found
    runs.counts[failed] = found >= 0
