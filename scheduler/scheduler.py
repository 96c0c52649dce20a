"""`Scheduler`: decides each step who computes how many tokens, and who owns which pages.

    plan   = scheduler.plan()           # None exactly when there is no work
    output = engine.step(plan)
    events = scheduler.commit(plan, output)

Plan and commit alternate; `add` and `abort` may come at any time between. No tensors, no threads, no input or output.
"""

import itertools
import time
from collections.abc import Callable

import numpy as np

from ..core.errors import GenerationError, InvalidRequestError, OverloadedError, describe
from ..core.ids import RequestId, SlotId
from ..core.messages import EngineStats, Event, Failed, Finished, StepEvent
from ..core.plan import (
    NO_TOKEN,
    NON_FINITE,
    BatchPlan,
    Decodes,
    IntArray,
    PageGrants,
    SequenceOutput,
    StepOutput,
    StoredBlock,
)
from ..core.request import Request
from .admission import check_request
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .decodes import DecodeBatch
from .outcome import accept, accept_tokens
from .prefix import Bundle
from .sequence import SequenceState
from .swap import SwapCosts
from .waiting import WaitingQueue


class Scheduler:
    """Continuous batching over a paged cache: first come, first served; preemption by swapping or recomputation.

    Who is admitted fits alone, and the first sequence that a step plans may preempt all others: so every plan moves
    at least one sequence forward, and every accepted request ends.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._cache = CacheManager(config, clock)
        self._swap_costs = SwapCosts()
        self._free_slots = [SlotId(slot) for slot in reversed(range(config.max_num_seqs))]
        self._arrivals = itertools.count()
        self._requests: dict[RequestId, list[SequenceState]] = {}
        """The unfinished choices of each request."""
        self._waiting = WaitingQueue()
        self._running: list[SequenceState] = []
        """Holders of a slot, oldest arrival first."""
        self._decodes = DecodeBatch(config.max_num_seqs)
        """Those of them that decode steadily."""
        self._in_flight: tuple[BatchPlan, BatchDraft] | None = None
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._batch_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs; then `plan` gives a plan."""
        return bool(self._running or len(self._waiting))

    def add(self, request: Request) -> None:
        """Take a request, one sequence per choice.

        Raises `InvalidRequestError` (also for an id in use), `ContextLengthError` or `OverloadedError`; then nothing
        of it was taken.
        """
        check_request(request, self.config)
        if request.id in self._requests:
            raise InvalidRequestError(f"a request with the id {request.id!r} is already being served", param="id")
        choices, now = request.params.n, self._clock()
        too_many = len(self._waiting) + choices - self.config.max_waiting
        if too_many > 0:
            seconds = self._waiting.retry_after(too_many, now)
            raise OverloadedError(
                f"the queue is full ({len(self._waiting):,} sequences wait); try again in {seconds:.0f} s",
                retry_after=seconds,
            )
        self._requests[request.id] = [
            SequenceState.create(request, index, next(self._arrivals), now, self.config) for index in range(choices)
        ]
        for sequence in self._requests[request.id]:
            self._waiting.add(sequence)

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request in whatever state; no event tells of it. False if it is unknown (or ended already)."""
        sequences = self._requests.pop(request_id, None)
        if sequences is None:
            return False
        for sequence in sequences:
            self._retire(sequence)
        return True

    def plan(self) -> BatchPlan | None:
        """Decide the next step: decodes, then begun prompts, then new sequences, up to `max_batch_tokens`.

        None exactly when there is no work. The plan must be committed before the next one.
        """
        assert self._in_flight is None, "the last plan was not committed"
        if not self.has_work:
            return None
        self._cache.expire_pins()
        draft = BatchDraft(self.config.max_batch_tokens)
        prompts = self._plan_decodes(draft)
        for sequence in prompts:
            # A slot that is gone: preempted in favour of one planned before.
            if draft.budget and sequence.slot is not None:
                self._continue(sequence, draft)
        # After a preemption the victim heads the queue and does not fit: its pages went to who needed them.
        self._admit(draft)
        assert draft.members or draft.decoders, "there is work, but no sequence could be planned"
        plan = draft.build(self._cache.take_swaps())
        self._in_flight = plan, draft
        return plan

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[StepEvent]:
        """Take in the results of the plan in flight; tells what is new, per choice its tokens before `Finished`."""
        assert self._in_flight is not None and self._in_flight[0] is plan, "this is not the plan in flight"
        draft, self._in_flight = self._in_flight[1], None
        self._swap_costs.observe(plan, output)
        self._steps += 1
        self._batch_tokens = plan.num_tokens
        events = self._commit_decodes(plan.decodes, draft.decoders, output.decoded)
        for sequence, part, result in zip(draft.members, plan.sequences, output.sequences, strict=True):
            assert sequence.done or len(result.token_ids) == (part.sample and result.error is None)
            assert sequence.done or result.error or len(result.prompt_logprobs) == len(part.score_ids)
            events += self._settle(sequence, len(part.token_ids), result)
        return events

    def stats(self) -> EngineStats:
        """Counts after the last commit; the times are the loop's to fill in."""
        self._cache.expire_pins()
        host, page_bytes = self._cache.host, self.config.page_bytes
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self._cache.used,
            pages_cached=self._cache.cached,
            pages_total=self.config.num_pages,
            steps_total=self._steps,
            preemptions_total=self._preemptions,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            prefix_queries_total=self._cache.queries,
            prefix_hits_total=self._cache.hits,
            prefix_host_hits_total=self._cache.host_hits,
            pages_pinned=self._cache.pinned,
            pins_dropped_total=self._cache.pins_dropped,
            host_pages_parked=host.parked,
            host_pages_cached=host.cached,
            host_pages_total=host.total,
            swap_out_sequences_total=self._cache.swapped_out,
            swap_in_sequences_total=self._cache.swapped_in,
            swap_out_pages_total=host.pages_out,
            swap_in_pages_total=host.pages_in,
            swap_out_bytes_total=host.pages_out * page_bytes,
            swap_in_bytes_total=host.pages_in * page_bytes,
            batch_tokens=self._batch_tokens,
        )

    def stored_blocks(self) -> list[StoredBlock]:
        """Prefix blocks that no sequence uses: the next to be given up first."""
        blocks = []
        for bundle in self._cache.stored():
            pages = bundle.host if bundle.pages is None else bundle.pages
            assert pages is not None
            blocks.append(StoredBlock(bundle.digest, pages, in_host=bundle.pages is None))
        return blocks

    def adopt_blocks(self, digests: list[bytes]) -> list[StoredBlock]:
        """Make room for blocks of an earlier run, given in the order of `stored_blocks`, before the first request.

        Returns those that fit, the last ones; the caller fills their pages.
        """
        self._cache.adopt(digests)
        return self.stored_blocks()

    def forget_prefixes(self) -> None:
        """Give up every prefix that no sequence uses."""
        self._cache.reclaim_all()

    def check_integrity(self) -> None:
        """AssertionError unless pages, slots, tables and queues agree; costs a pass over all of them."""
        self._cache.check(self._running, self._waiting)
        slots = [sequence.slot for sequence in self._running] + self._free_slots
        assert sorted(slot for slot in slots if slot is not None) == list(range(self.config.max_num_seqs))
        self._decodes.check()
        flying = [*self._in_flight[1].decoders, *self._in_flight[1].members] if self._in_flight else []
        assert flying == [sequence for sequence in flying if sequence in self._running and sequence.in_flight]
        for sequence in self._running:
            sequence.check(self.config)
            assert not sequence.done or sequence.in_flight, "an ended sequence still holds a slot"
            assert not sequence.in_flight or sequence in flying
            assert sequence.in_flight or sequence.steady == sequence.decodes_plainly
        for sequence in self._waiting:
            assert sequence.slot is None and not sequence.table.num_pages and not sequence.num_computed
            assert not sequence.blocks
        alive = {sequence.arrival for sequences in self._requests.values() for sequence in sequences}
        held = [sequence.arrival for sequence in [*self._running, *self._waiting] if not sequence.done]
        assert len(held) == len(alive) and set(held) == alive, "requests and queues disagree"

    # --- planning ---

    def _plan_decodes(self, draft: BatchDraft) -> list[SequenceState]:
        """Plan the sequences that decode; returns those that have a prompt to compute.

        First, by arrival, those that need more than a row of the decode batch: pages, or a part of their own.
        """
        lacking, others = self._decodes.without_room(), list[SequenceState]()
        if len(self._running) > len(self._decodes):
            others = [sequence for sequence in self._running if not sequence.steady]
        if lacking and not self._grow_together(lacking, draft):
            others += lacking
            others.sort(key=lambda sequence: sequence.arrival)
        prompts = []
        for sequence in others:
            if sequence.num_pending > 1:
                prompts.append(sequence)
            elif draft.budget and sequence.slot is not None:
                self._continue(sequence, draft)
        draft.decode(*self._decodes.plan(draft.budget))
        return prompts

    def _grow_together(self, sequences: list[SequenceState], draft: BatchDraft) -> bool:
        """A new page for each head of all the steady decodes given; False, and nothing done, if that is not so simple.

        It is not if pages or budget are short, or heads differ. Otherwise each sequence costs a few microseconds.
        """
        needed = len(sequences) * self.config.num_rows
        if len(sequences) > draft.budget or needed > self._cache.available or self.config.row_windows is not None:
            return False
        if any(sequence.table.ragged for sequence in sequences):
            return False
        ids = self._cache.take(needed)
        per_sequence = ids.reshape(len(sequences), -1)
        columns = [sequence.table.add_column(own) for sequence, own in zip(sequences, per_sequence, strict=True)]
        draft.add_columns(sequences, columns, ids)
        for sequence in sequences:
            self._decodes.grown(sequence)
            draft.promise(sequence)
        return True

    def _continue(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan the next tokens of a running sequence, if it can get the pages for them."""
        count = sequence.next_chunk(draft.budget)
        if count > sequence.table.room and not self._grow(sequence, count, draft):
            return
        if sequence.steady:
            self._decodes.grown(sequence)
            draft.promise(sequence)
            return
        draft.add(sequence, count)
        if count < sequence.num_pending:
            draft.owed += max(self.config.pages_needed(len(sequence.tokens)) - sequence.table.num_pages, 0)

    def _grow(self, sequence: SequenceState, count: int, draft: BatchDraft) -> bool:
        """Make room for `count` entries: from its own windows, then from what nobody uses, then by preemption.

        False if the sequence had to go itself, or to wait for a step.
        """
        drops: list[tuple[IntArray, int]] = []
        if self.config.row_windows is not None:
            drops, freed = sequence.table.drop_unseen(self.config.row_windows)
            self._cache.give(freed)
        lacking = sequence.table.lacking(count)
        needed = int(lacking.sum())
        while needed > self._cache.available:
            if len(self._running) == 1:
                self._cache.drop_pins(needed)
                assert needed <= self._cache.available, "a sequence that was admitted does not fit the pool alone"
                break
            victim = self._victim()
            if victim is sequence and self._can_wait(sequence):
                draft.change_pages(sequence, drops, PageGrants.none())
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        ids = self._cache.take(needed)
        rows, columns = sequence.table.grow(lacking, ids)
        slots = np.full(needed, sequence.slot, np.int32)
        draft.change_pages(sequence, drops, PageGrants(slots, rows, columns, ids))
        return True

    def _victim(self) -> SequenceState:
        """Whom to preempt: the youngest that comes back as it is, or the youngest of all.

        Never one that is in this step already: its tokens and pages are promised.
        """
        idle = [sequence for sequence in reversed(self._running) if not sequence.in_flight]
        return next((sequence for sequence in idle if self._cache.comes_back_whole(sequence)), idle[0])

    def _can_wait(self, sequence: SequenceState) -> bool:
        """Whether a sequence that would not come back as it is keeps its pages for now, because others move on."""
        return not self._cache.comes_back_whole(sequence) and any(other.in_flight for other in self._running)

    def _preempt(self, sequence: SequenceState) -> None:
        """Take back pages and slot; what was not swapped out is recomputed when the sequence re-enters."""
        self._cache.swap_out(sequence, self._swap_costs)
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self._preemptions += 1
        self._waiting.put_back(sequence)

    def _admit(self, draft: BatchDraft) -> None:
        """Start waiting sequences in order, while there are tokens, slots and pages for all their known tokens.

        The head of the queue is not overtaken: a long prompt gets its turn. Only while another sequence computes the
        very block that it needs next it is passed over, and looked at first again in the next step.
        """
        if not (draft.budget and self._free_slots and len(self._waiting)):
            return
        prompts = [sequence for sequence in self._running if sequence.num_pending > 1]
        passed: set[RequestId] = set()
        for sequence in list(itertools.islice(self._waiting, 2 * self.config.max_num_seqs)):
            if sequence.request.id in passed:  # choices of one request wait for the same
                continue
            hits = self._cache.find(sequence)
            if any(self._cache.awaits(sequence, hits, other) for other in prompts):
                passed.add(sequence.request.id)
                continue
            needed = self._cache.cost(sequence, hits) + draft.owed
            if self._running:
                needed += self.config.watermark
            if needed > self._cache.available:
                if self._running:
                    return
                self._cache.drop_pins(needed)
            self._start(sequence, hits, draft)
            prompts.append(sequence)
            if not (draft.budget and self._free_slots):
                return

    def _start(self, sequence: SequenceState, hits: list[Bundle], draft: BatchDraft) -> None:
        """Lend a waiting sequence a slot; it begins with what the prefix cache has of it."""
        now = self._clock()
        self._waiting.start(sequence, now)
        sequence.slot = self._free_slots.pop()
        if sequence.started_at is None:
            sequence.started_at = now
        self._running.append(sequence)
        self._running.sort(key=lambda running: running.arrival)
        self._cache.enter(sequence, hits)
        draft.enter(sequence)
        sequence.swapped = None
        self._continue(sequence, draft)

    # --- results ---

    def _commit_decodes(self, decodes: Decodes, members: list[SequenceState], sampled: IntArray) -> list[StepEvent]:
        """Apply the results of the decode batch: all at once but for those that end by them or were aborted."""
        if not members:
            return []
        over = self._decodes.settle(decodes, sampled).tolist()
        # Also of those that are over: they are published once they are settled.
        filled = [members[row] for row in np.flatnonzero((decodes.starts + 1) % self.config.page_size == 0).tolist()]
        token_ids: list[int] = sampled.tolist()
        ending = [(members[row], token_ids[row]) for row in over]
        for row in reversed(over):
            del members[row], token_ids[row]
        events: list[StepEvent] = [accept_tokens(members, token_ids)] if members else []
        self._generation_tokens += len(members)
        for sequence in filled:
            self._cache.publish(sequence)
        for sequence, token in ending:
            result = SequenceOutput(error=NON_FINITE) if token == NO_TOKEN else SequenceOutput((token,))
            events += self._settle(sequence, 1, result)
        return events

    def _settle(self, sequence: SequenceState, count: int, result: SequenceOutput) -> list[Event]:
        """Apply the result of one sequence that computed `count` tokens."""
        sequence.in_flight = 0
        if sequence.done:
            self._leave(sequence)
            return []
        request_id = sequence.request.id
        if result.error is not None:
            self._cache.withdraw(sequence)
            self.abort(request_id)
            return [Failed(request_id, describe(GenerationError(result.error)))]
        self._prompt_tokens += sequence.advance(count)
        self._cache.publish(sequence)
        self._cache.pin(sequence)
        if count > 1 and self.config.row_windows is not None:
            # A long chunk leaves much behind the window: look at it in the next step, not when a page is full.
            sequence.table.room = 0
        sequence.num_scored += len(result.prompt_logprobs)
        self._generation_tokens += len(result.token_ids)
        events = accept(sequence, result)
        if events and isinstance(events[-1], Finished):
            self._finish(sequence)
        elif sequence.decodes_plainly:
            self._decodes.join(sequence)
        return events

    def _finish(self, sequence: SequenceState) -> None:
        """The sequence is complete; with its last choice the request is."""
        choices = self._requests[sequence.request.id]
        choices.remove(sequence)
        if not choices:
            del self._requests[sequence.request.id]
        self._retire(sequence)

    def _retire(self, sequence: SequenceState) -> None:
        """End a sequence; what is in flight keeps slot and pages until the commit, for the engine writes there."""
        sequence.done = True
        self._decodes.leave(sequence)
        if sequence.slot is None:
            self._waiting.remove(sequence)
            self._cache.discard(sequence)
        elif not sequence.in_flight:
            self._leave(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        """Take back slot and pages."""
        assert sequence.slot is not None
        self._decodes.leave(sequence)
        self._cache.leave(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.in_flight = 0
        self._running.remove(sequence)
