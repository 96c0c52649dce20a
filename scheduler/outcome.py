"""What a step's result means for one sequence: new tokens, the end, and the events that tell of them."""

from collections.abc import Iterable

from ..core.messages import Decoded, Event, Finished, FinishReason, Logprob, Recorded, StepEvent, Tokens
from ..core.plan import Decodes, Runs, SequenceOutput, SequencePlan, StepOutput, TokenLogprob
from .batch import BatchDraft
from .config import SchedulerConfig
from .sequence import SequenceState


def accept(
    decodes: Decodes, members: list[SequenceState], over: list[int], output: StepOutput
) -> tuple[list[StepEvent], list[SequenceState]]:
    """Take in what the rows of the decode batch got that are not `over`, ascending: `members` are left with those.

    Returns the events, and who got a token, as often as they got one.
    """
    token_ids: list[int] = output.decoded.tolist()
    runs: list[list[int]] = [] if decodes.drafts is None else _runs(token_ids, output.runs)
    for row in reversed(over):
        del members[row], (runs or token_ids)[row]
    if not members:
        return [], members
    if not runs:
        return [_accept_tokens(members, token_ids)], members
    generated = [sequence for sequence, run in zip(members, runs, strict=True) for _ in run]
    return [_accept_runs(members, runs)], generated


def _runs(token_ids: list[int], runs: Runs | None) -> list[list[int]]:
    """Tokens of each row."""
    if runs is None:
        return [[token] for token in token_ids]
    return [row[:count] for row, count in zip(runs.token_ids.tolist(), runs.counts.tolist(), strict=True)]


def _accept_tokens(sequences: list[SequenceState], token_ids: list[int]) -> Decoded:
    """Take in one computed and one accepted token of each of many sequences, none of which ends by it.

    The same as `append` and `SequenceState.advance(1)`, in one loop without calls: it is most of a step's cost.
    """
    for sequence, token in zip(sequences, token_ids, strict=True):
        sequence.in_flight -= 1
        sequence.tokens.append(token)
        sequence.num_computed += 1
        table = sequence.table
        table.appended += 1
        table.room -= 1
    ids = [sequence.request.id for sequence in sequences]
    return Decoded(ids, [sequence.index for sequence in sequences], token_ids)


def _accept_runs(sequences: list[SequenceState], token_ids: list[list[int]]) -> Decoded:
    """The same with one computed token for each accepted one, of a step in which some drafted."""
    for sequence, run in zip(sequences, token_ids, strict=True):
        sequence.in_flight, count = 0, len(run)
        sequence.tokens += run
        sequence.num_computed += count
        table = sequence.table
        table.appended += count
        table.room -= count
    ids, counts = [sequence.request.id for sequence in sequences], [len(run) for run in token_ids]
    indices, flat = [sequence.index for sequence in sequences], [token for run in token_ids for token in run]
    return Decoded(ids, indices, flat, counts if len(flat) > len(counts) else None)


def append(sequence: SequenceState, result: SequenceOutput) -> tuple[int, FinishReason | None]:
    """Append accepted and forced tokens up to the end, if it is among them; returns how many, and how it ended.

    The caller takes slot and pages back. End tokens count only once `min_tokens` came before them, which is how long
    the engine masks them out; where a grammar ends, so does the sequence.
    """
    taken, min_tokens = 0, sequence.request.params.min_tokens
    for token in (*result.token_ids, *result.forced):
        is_end = token in sequence.stop_ids and sequence.num_generated >= min_tokens
        sequence.tokens.append(token)
        taken += 1
        if is_end:
            return taken, "stop"
        if len(sequence.tokens) >= sequence.max_length:
            whole = taken == len(result.token_ids) + len(result.forced)
            return taken, "stop" if result.ended and whole else "length"
    return taken, "stop" if result.ended else None


def recorded_rows(draft: BatchDraft, output: StepOutput) -> list[StepEvent]:
    """What the model said at the tokens that a step gave, where that is asked for; comes before the tokens."""
    steady = [(draft.decoders[row], list(rows)) for row, rows in output.recorded.items()]
    others = [(s, list(o.recorded)) for s, o in zip(draft.members, output.sequences, strict=True) if o.recorded]
    return [Recorded(s.request.id, s.index, rows) for s, rows in steady + others if not s.done]


def news(
    sequence: SequenceState, result: SequenceOutput, taken: int, reason: FinishReason | None, config: SchedulerConfig
) -> list[Event]:
    """What `append` did, told once the sequence is in its new state: `Tokens`, then `Finished` at its end."""
    events: list[Event] = []
    if taken or result.prompt_logprobs:
        events.append(_tokens(sequence, result, taken, config))
    if reason is not None:
        events.append(_finished(sequence, reason))
    return events


def check_result(sequence: SequenceState, part: SequencePlan, result: SequenceOutput) -> None:
    """AssertionError unless the engine gave a sequence what its part of the plan asked for."""
    if sequence.done or result.error is not None:
        return
    assert result.drafted <= part.drafts, "more was drafted than planned"
    assert part.sample <= len(result.token_ids) <= part.sample * (1 + result.drafted)
    assert len(result.prompt_logprobs) == len(part.score_ids)


def _finished(sequence: SequenceState, reason: FinishReason) -> Finished:
    assert sequence.started_at is not None
    return Finished(
        request_id=sequence.request.id,
        index=sequence.index,
        reason=reason,
        queue_seconds=sequence.started_at - sequence.arrived_at,
    )


def _tokens(sequence: SequenceState, result: SequenceOutput, taken: int, config: SchedulerConfig) -> Tokens:
    wanted = sequence.request.params.logprobs is not None and taken > 0
    is_first = taken > 0 and sequence.num_generated == taken
    return Tokens(
        request_id=sequence.request.id,
        index=sequence.index,
        token_ids=sequence.tokens[len(sequence.tokens) - taken :],
        logprobs=_wire(result.logprobs[:taken]) if wanted else None,
        prompt_logprobs=_wire(result.prompt_logprobs) if result.prompt_logprobs else None,
        cached_tokens=sequence.cached_tokens if is_first else 0,
        pinned_tokens=(sequence.pinned_tokens or 0) if is_first else 0,
        cache=sequence.cache_use(config),
    )


def _wire(logprobs: Iterable[TokenLogprob]) -> list[Logprob]:
    return [Logprob(entry.token_id, entry.logprob, list(entry.top)) for entry in logprobs]
