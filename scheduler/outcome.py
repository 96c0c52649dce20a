"""What a step's result means for one sequence: new tokens, the end, and the events that tell of them."""

from collections.abc import Iterable

from ..core.messages import Decoded, Event, Finished, Logprob, Tokens
from ..core.plan import SequenceOutput, TokenLogprob
from .config import SchedulerConfig
from .sequence import SequenceState


def accept_tokens(sequences: list[SequenceState], token_ids: list[int]) -> Decoded:
    """Take in one computed and one accepted token of each of many sequences, none of which ends by it.

    The same as `SequenceState.advance(1)` and `accept`, in one loop without calls: it is most of a step's cost.
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


def accept(sequence: SequenceState, result: SequenceOutput, config: SchedulerConfig) -> list[Event]:
    """Append the accepted tokens up to the end, if it is among them; `Tokens`, then `Finished` in that case.

    Marks the sequence done at its end; the caller takes slot and pages back. End tokens count only once `min_tokens`
    came before them, which is how long the engine masks them out.
    """
    params = sequence.request.params
    ending: Finished | None = None
    taken = 0
    for token in result.token_ids:
        is_end = token in sequence.stop_ids and sequence.num_generated >= params.min_tokens
        sequence.tokens.append(token)
        taken += 1
        if is_end:
            ending = _finished(sequence, token)
        elif len(sequence.tokens) >= sequence.max_length:
            ending = _finished(sequence, None)
        if ending:
            break
    events: list[Event] = []
    if taken or result.prompt_logprobs:
        events.append(_tokens(sequence, result, taken, config))
    if ending:
        events.append(ending)
    return events


def _finished(sequence: SequenceState, stop_token: int | None) -> Finished:
    assert sequence.started_at is not None
    return Finished(
        request_id=sequence.request.id,
        index=sequence.index,
        reason="length" if stop_token is None else "stop",
        stop_token_id=stop_token,
        queue_seconds=sequence.started_at - sequence.arrived_at,
        preemptions=sequence.preemptions,
        cached_tokens=sequence.cached_tokens,
        pinned_tokens=sequence.pinned_tokens or 0,
    )


def _tokens(sequence: SequenceState, result: SequenceOutput, taken: int, config: SchedulerConfig) -> Tokens:
    wanted = sequence.request.params.logprobs is not None and taken > 0
    is_first = taken > 0 and sequence.num_generated == taken
    return Tokens(
        request_id=sequence.request.id,
        index=sequence.index,
        token_ids=list(result.token_ids[:taken]),
        logprobs=_wire(result.logprobs[:taken]) if wanted else None,
        prompt_logprobs=_wire(result.prompt_logprobs) if result.prompt_logprobs else None,
        cached_tokens=sequence.cached_tokens if is_first else 0,
        pinned_tokens=(sequence.pinned_tokens or 0) if is_first else 0,
        cache=sequence.cache_use(config),
    )


def _wire(logprobs: Iterable[TokenLogprob]) -> list[Logprob]:
    return [Logprob(entry.token_id, entry.logprob, list(entry.top)) for entry in logprobs]
