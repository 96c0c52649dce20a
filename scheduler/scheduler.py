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
from ..core.messages import EngineStats, Event, Failed, Finished
from ..core.plan import BatchPlan, IntArray, PageGrants, SequenceOutput, SequencePlan, StepOutput
from ..core.request import Request
from .admission import check_request
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .outcome import accept
from .prefix import Bundle
from .pruning import Pruning
from .sequence import SequenceState
from .waiting import WaitingQueue


class Scheduler:
    """Continuous batching over a paged cache: first come, first served; preemption by recomputation.

    Who is admitted fits alone, and the first sequence that a step plans may preempt all others: so every plan moves
    at least one sequence forward, and every accepted request ends.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._cache = CacheManager(config)
        self._pruning = Pruning(config, self._cache)
        self._free_slots = [SlotId(slot) for slot in reversed(range(config.max_num_seqs))]
        self._arrivals = itertools.count()
        self._requests: dict[RequestId, list[SequenceState]] = {}
        """The unfinished choices of each request."""
        self._waiting = WaitingQueue()
        self._running: list[SequenceState] = []
        """Holders of a slot, oldest arrival first."""
        self._in_flight: tuple[BatchPlan, list[SequenceState], list[SequenceState]] | None = None
        """The plan, who computes in it, and who is to be pruned."""
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._batch_tokens = 0
        self._lossy_preemptions = 0

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
        draft = BatchDraft(self.config.max_batch_tokens)
        self._pruning.compact(draft)
        repeating = [sequence for sequence in self._running if self._pruning.repeats(sequence)]
        decodes = [sequence for sequence in self._running if sequence.num_pending == 1 and sequence not in repeating]
        prompts = [sequence for sequence in self._running if sequence.num_pending > 1]
        for sequence in itertools.chain(decodes, repeating, prompts):
            # A slot that is gone: preempted in favour of one planned before.
            if draft.budget and sequence.slot is not None:
                self._continue(sequence, draft)
        # After a preemption the victim heads the queue and does not fit: its pages went to who needed them.
        self._admit(draft)
        assert draft.members or draft.prunes, "there is work, but no sequence could be planned"
        plan = draft.build()
        self._in_flight = plan, draft.members, list(draft.prunes)
        return plan

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[Event]:
        """Take in the results of the plan in flight; tells what is new, per choice `Tokens` before `Finished`."""
        assert self._in_flight is not None and self._in_flight[0] is plan, "this is not the plan in flight"
        (_, members, pruned), self._in_flight = self._in_flight, None
        self._steps += 1
        self._batch_tokens = plan.num_tokens
        events: list[Event] = []
        for sequence, part, result in zip(members, plan.sequences, output.sequences, strict=True):
            sequence.in_flight = 0
            if sequence.done:
                self._leave(sequence)
            else:
                events += self._settle(sequence, part, result)
        self._pruning.commit(pruned, output.kept, output.prune_seconds)
        return events

    def stats(self) -> EngineStats:
        """Counts after the last commit; the times are the loop's to fill in."""
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
            batch_tokens=self._batch_tokens,
            prunes=self._pruning.totals,
            lossy_preemptions_total=self._lossy_preemptions,
        )

    def check_integrity(self) -> None:
        """AssertionError unless pages, slots, tables and queues agree; costs a pass over all of them."""
        self._cache.check(self._running)
        slots = [sequence.slot for sequence in self._running] + self._free_slots
        assert sorted(slot for slot in slots if slot is not None) == list(range(self.config.max_num_seqs))
        flying = self._in_flight[1] if self._in_flight else []
        assert flying == [sequence for sequence in flying if sequence in self._running and sequence.in_flight]
        for sequence in self._running:
            sequence.check(self.config)
            assert not sequence.done or sequence.in_flight, "an ended sequence still holds a slot"
            assert not sequence.in_flight or sequence in flying
        for sequence in self._waiting:
            assert sequence.slot is None and not sequence.table.num_pages and not sequence.num_computed
            assert not sequence.blocks
        alive = {sequence.arrival for sequences in self._requests.values() for sequence in sequences}
        held = [sequence.arrival for sequence in [*self._running, *self._waiting] if not sequence.done]
        assert len(held) == len(alive) and set(held) == alive, "requests and queues disagree"

    # --- planning ---

    def _continue(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan the next tokens of a running sequence, if it can get the pages for them."""
        if self._pruning.repeats(sequence):
            self._repeat(sequence, draft)
            return
        count = sequence.next_chunk(draft.budget)
        if count > sequence.table.room and not self._grow(sequence, count, draft):
            return
        draft.add(sequence, sequence.plan(count))
        self._pruning.order_if_due(sequence, draft)
        if count < sequence.num_pending:
            most = self.config.pages_needed(sequence.most_entries(self.config))
            draft.owed += max(most - sequence.table.num_pages, 0)

    def _repeat(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan what the model repeats of a sequence, for its policy to see, if it can get the pages for that."""
        ids, count = self._pruning.repetition(sequence, draft.budget)
        if not count or (len(ids) > sequence.table.room and not self._grow(sequence, len(ids), draft)):
            return
        assert sequence.prune is not None
        sequence.prune.repeating = count
        draft.add(sequence, sequence.plan_repetition(ids))
        self._pruning.order_if_due(sequence, draft)

    def _grow(self, sequence: SequenceState, count: int, draft: BatchDraft) -> bool:
        """Make room for `count` entries: from its own windows, what nobody uses, by pruning, then by preemption.

        False if the sequence had to go itself, or to wait a step.
        """
        drops: list[tuple[IntArray, int]] = []
        if self.config.row_windows is not None:
            drops, freed = sequence.table.drop_unseen(self.config.row_windows)
            self._cache.give(freed)
        lacking = sequence.table.lacking(count)
        needed = int(lacking.sum())
        while needed > self._cache.available:
            waits = self._pruning.relieve(needed, self._running, draft)
            victim = sequence if waits else self._victim()
            if victim is sequence and (waits or (draft.members and not sequence.is_exact)):
                draft.change_pages(sequence, drops, PageGrants.none())
                return False
            assert len(self._running) > 1, "a sequence that was admitted does not fit the pool alone"
            draft.forget(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        ids = self._cache.take(needed)
        rows, columns = sequence.table.grow(lacking, ids)
        slots = np.full(needed, sequence.slot, np.int32)
        draft.change_pages(sequence, drops, PageGrants(slots, rows, columns, ids))
        return True

    def _victim(self) -> SequenceState:
        """Who goes when pages are short: the youngest, of those that can be recomputed exactly if there are such.

        Never one that is in this step already: its tokens and pages are promised.
        """
        idle = [sequence for sequence in reversed(self._running) if not sequence.in_flight]
        return next((sequence for sequence in idle if sequence.is_exact), idle[0])

    def _preempt(self, sequence: SequenceState) -> None:
        """Take back pages and slot; everything known is recomputed when the sequence re-enters."""
        self._lossy_preemptions += not sequence.is_exact
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
        if not (draft.budget and self._free_slots):
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
                return
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
        if sequence.prune is not None:
            sequence.prune.enter(len(sequence.tokens))
        shared = self._cache.enter(sequence, hits)
        draft.enter(sequence, shared)
        self._continue(sequence, draft)

    # --- results ---

    def _settle(self, sequence: SequenceState, part: SequencePlan, result: SequenceOutput) -> list[Event]:
        """Apply one sequence's result."""
        request_id = sequence.request.id
        if result.error is not None:
            self._cache.withdraw(sequence)
            self.abort(request_id)
            return [Failed(request_id, describe(GenerationError(result.error)))]
        if part.scratch:
            self._pruning.repeated(sequence)
            return []
        assert len(result.token_ids) == part.sample, "the engine sampled where it should not, or did not"
        assert len(result.prompt_logprobs) == len(part.score_ids)
        count = len(part.token_ids)
        self._prompt_tokens += sequence.advance(count)
        self._cache.publish(sequence)
        if count > 1 and self.config.row_windows is not None:
            # A long chunk leaves much behind the window: look at it in the next step, not when a page is full.
            sequence.table.room = 0
        sequence.num_scored += len(part.score_ids)
        self._generation_tokens += len(result.token_ids)
        events = accept(sequence, result, self.config)
        if events and isinstance(events[-1], Finished):
            self._finish(sequence)
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
        if sequence.slot is None:
            self._waiting.remove(sequence)
        elif not sequence.in_flight:
            self._leave(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        """Take back slot and pages."""
        assert sequence.slot is not None
        self._cache.leave(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.in_flight = 0
        self._running.remove(sequence)
