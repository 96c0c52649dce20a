"""`Scheduler`: decides each step who computes how many tokens, and who owns which pages.

    plan   = scheduler.plan()           # None when there is no work
    output = engine.step(plan)
    events = scheduler.commit(plan, output)

Plan and commit alternate, but that `look_ahead` may give the plan after the one in flight; commit both in their order.
`add` and `abort` may come at any time between. No tensors, no threads, no input or output.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ..core.errors import GenerationError, InvalidRequestError, QuireError, describe
from ..core.ids import RequestId, SlotId
from ..core.messages import EngineStats, Event, Failed, StepEvent
from ..core.plan import BatchPlan, Decodes, SequenceOutput, StepOutput
from ..core.request import Request
from ..core.speculation import SpeculationCounts
from .admission import check_request, check_room
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .decodes import DecodeBatch
from .entrance import Entrance
from .growth import Growth
from .integrity import check_queue, check_running
from .lookahead import may_enter, only_decodes
from .outcome import accept, append, check_result, news, recorded_rows
from .oversight import Oversight
from .pace import Pace
from .policy import POLICIES, position
from .preemption import giving_way
from .pruning import Pruning
from .sequence import SequenceState
from .speculation import Speculation
from .swap import SwapCosts
from .waiting import WaitingQueue


class Scheduler:
    """Continuous batching over a paged cache, in the order of a policy; preemption by swapping or recomputation.

    Who is admitted fits alone, and the policy's first sequence may preempt all others: so every plan moves at least
    one sequence forward, and every accepted request ends.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._cache = CacheManager(config, clock)
        self._swap_costs = SwapCosts()
        self._policy = POLICIES[config.policy]()
        self._pace = Pace(config.max_itl, config.page_size)
        self._oversight = Oversight(config.queue_timeout)
        self._pruning = Pruning(config, self._cache)
        self._free_slots = [SlotId(slot) for slot in reversed(range(config.max_num_seqs))]
        self._arrivals = itertools.count()
        self._requests: dict[RequestId, list[SequenceState]] = {}
        """The unfinished choices of each request."""
        self._waiting = WaitingQueue(self._policy)
        self._running: list[SequenceState] = []
        """Holders of a slot."""
        self._decodes = DecodeBatch(config.max_num_seqs)
        """Those of them that decode steadily."""
        lists = self._running, self._decodes
        self._growth = Growth(config, self._cache, self._pruning, self._policy, *lists, self._preempt)
        self.speculation = Speculation(config, self._decodes, self._growth, clock) if config.draft else None
        self._entrance = Entrance(config, self._cache, self._waiting, self._running, self._free_slots)
        self._in_flight: deque[tuple[BatchPlan, BatchDraft]] = deque()
        """At most two."""
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._batch_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or may; then `plan` gives a plan."""
        return bool(self._running or self._waiting.num_ready)

    def add(self, request: Request, held: bool = False) -> None:
        """Take a request, one sequence per choice; held: it only waits, until `release`.

        Raises `InvalidRequestError` (also for an id in use), `ContextLengthError` or `OverloadedError`; then nothing
        of it was taken.
        """
        check_request(request, self.config)
        if request.id in self._requests:
            raise InvalidRequestError(f"a request with the id {request.id!r} is already being served", param="id")
        check_room(request, self._waiting, self.config, now := self._clock())
        self._requests[request.id] = [
            SequenceState.create(request, index, next(self._arrivals), now, self.config)
            for index in range(request.params.n)
        ]
        for sequence in self._requests[request.id]:
            self._policy.arrived(sequence)
            self._waiting.add(sequence, held)
        self._oversight.arrived(self._requests[request.id], now)

    def release(self, request_id: RequestId) -> None:
        """A request that was held may run."""
        for sequence in self._requests[request_id]:
            self._waiting.release(sequence)

    def knows(self, request_id: RequestId) -> bool:
        """Whether the request was taken and has not ended; on any thread."""
        return request_id in self._requests

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request in whatever state; no event tells of it. False if it is unknown (or ended already)."""
        sequences = self._requests.pop(request_id, [])
        self._oversight.ended(request_id)
        for sequence in sequences:
            self._retire(sequence)
        return bool(sequences)

    def tend(self) -> list[Event]:
        """End the requests that are late or stuck, each with its error. Before a step, or while one is in flight."""
        return [self._fail(*late) for late in self._oversight.due(self._clock(), self._requests)]

    def plan(self) -> BatchPlan | None:
        """Decide the next step: decodes, then begun prompts, then new sequences, up to `max_batch_tokens`.

        None when there is no work, or by a fault, which the next `tend` ends. Commit the plan before the next one.
        """
        assert not self._in_flight, "the last plan was not committed"
        if not self.has_work:
            return None
        self._cache.pins.expire()
        draft = BatchDraft(self.config.max_batch_tokens)
        if self._entrance.is_open:
            self._growth.trim_all()
        for victim in giving_way(self._waiting, self._running, self._policy, self._cache):
            self._preempt(victim)
        for sequence in self._pruning.compact(draft):
            if sequence.decodes_plainly:
                self._decodes.join(sequence)
        prompts = self._plan_decodes(draft)
        draft.budget = min(draft.budget, max(self._pace.prompt_tokens(draft.size), self._pruning.least_step(prompts)))
        for sequence in prompts:
            # A slot that is gone: preempted in favour of one planned before.
            if draft.budget and sequence.slot is not None:
                self._continue(sequence, draft)
        # After a preemption the victim does not fit: its pages went to who needed them.
        self._entrance.admit(draft, self._start)
        self._oversight.watchdog.planned(self._running, draft.size, draft.budget, draft.waiting)
        if self.speculation is not None:
            self.speculation.plan(draft)
        if draft.is_empty:
            stuck = self._running[0] if self._running else self._waiting.first()
            if stuck is not None and not self.reclaim_leaks():
                self._oversight.watchdog.unplannable(stuck)
            return None
        return self._take_off(draft)

    def look_ahead(self) -> BatchPlan | None:
        """Decide the step after the one in flight before its results are known; None where it depends on them.

        Also None where that step could do more than decode on: let somebody in, for one. Then commit, and `plan`.
        """
        ((plan, _),) = self._in_flight
        if not only_decodes(plan, self._decodes, self._running):
            return None
        if may_enter(self._waiting, self._running, self._policy, self._cache, len(self._free_slots)):
            return None
        if self._growth.lends_ahead and self._entrance.is_open:  # what it lacks may be lent for drafts
            return None
        draft = BatchDraft(self.config.max_batch_tokens, steps=2)
        decodes, members, lacking = self._decodes.ahead(plan.decodes)
        if not members or (self.speculation is not None and self.speculation.wants(decodes)):
            return None
        if lacking and not self._growth.together(lacking, draft):
            return None
        draft.decode(decodes, members)
        if self.speculation is not None:
            self.speculation.skip(decodes)
        return self._take_off(draft)

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[StepEvent]:
        """Take in the results of the plan in flight; tells what is new, per choice its tokens before `Finished`."""
        assert self._in_flight and self._in_flight[0][0] is plan, "this is not the oldest plan in flight"
        _, draft = self._in_flight.popleft()
        self._steps += 1
        self._batch_tokens = plan.num_tokens
        self._pace.learn(plan, output)
        self._swap_costs.observe(plan, output)
        events = recorded_rows(draft, output) + self._commit_decodes(plan.decodes, draft.decoders, output)
        for sequence, part, result in zip(draft.members, plan.sequences, output.sequences, strict=True):
            check_result(sequence, part, result)
            sequence.in_flight = 0
            if part.scratch:
                self._pruning.repeated(sequence)
            events += self._settle(sequence, 0 if part.scratch else len(part.token_ids), result)
        self._pruning.commit(list(draft.prunes), output.kept, output.prune_seconds)
        for sequence in draft.prunes:
            self._decodes.leave(sequence)
        if self.speculation is not None:
            self.speculation.commit(plan, output, goes_on=self.has_work)
        return events

    def stats(self) -> EngineStats:
        """Counts after the last commit; the times are the loop's to fill in."""
        stats = EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            held=self._waiting.num_held,
            steps_total=self._steps,
            preemptions_total=self._preemptions,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            batch_tokens=self._batch_tokens,
            prunes=self._pruning.counts(),
            lossy_preemptions_total=self._pruning.lossy_preemptions,
            waiting_tokens=self._waiting.num_tokens,
            waiting_priorities=dict(self._waiting.priorities),
            timeouts_total=dict(self._oversight.timeouts),
            watchdog_total=dict(self._oversight.stuck),
            speculation=SpeculationCounts() if self.speculation is None else self.speculation.counts(),
        )
        return self._cache.report(stats)

    def reclaim_leaks(self) -> int:
        """When nothing runs, no page may be in use: take back those that are; returns how many. To be called idle."""
        return 0 if self._running else self._cache.reclaim_leaked()

    @property
    def prefixes(self) -> CacheManager:
        """Whose are the computed prefixes, to be saved or restored while nothing runs."""
        return self._cache

    def check_integrity(self) -> None:
        """AssertionError unless pages, slots, tables and queues agree; costs a pass over all of them."""
        self._cache.check(self._running, self._waiting)
        self._decodes.check()
        flying = [sequence for _, draft in self._in_flight for sequence in (*draft.decoders, *draft.members)]
        check_running(self._running, self._free_slots, flying, self.config)
        check_queue(self._waiting, self._running, self._requests.values())

    def _take_off(self, draft: BatchDraft) -> BatchPlan:
        plan = draft.build(self._cache.swaps.take(), self._cache.pruned.take())
        self._in_flight.append((plan, draft))
        return plan

    def _plan_decodes(self, draft: BatchDraft) -> list[SequenceState]:
        """Plan the sequences that decode; returns those that have a prompt to compute.

        First, in the policy's order, those that need more than a row of the decode batch: pages, or an own part.
        """
        lacking, others = self._decodes.without_room(), list[SequenceState]()
        if len(self._running) > len(self._decodes):
            others = [sequence for sequence in self._running if not sequence.steady]
        if lacking and not self._growth.together(lacking, draft):
            others += lacking
        others.sort(key=lambda sequence: position(self._policy, sequence))
        prompts = []
        for sequence in others:
            if not sequence.decodes or self._pruning.repeats(sequence):
                prompts.append(sequence)
            elif draft.budget and sequence.slot is not None:
                self._continue(sequence, draft)
        draft.decode(*self._decodes.plan(draft.budget))
        return prompts

    def _continue(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan the next tokens of a running sequence, if it can get the pages for them."""
        if self._pruning.repeats(sequence):
            self._repeat(sequence, draft)
            return
        count = self._growth.affordable(sequence, sequence.next_chunk(draft.budget))
        if count > sequence.table.room and not self._growth.grow(sequence, count, draft):
            return
        if sequence.steady:
            self._decodes.grown(sequence)
            draft.promise(sequence)
            return
        draft.add(sequence, sequence.plan(count))
        self._pruning.order_if_due(sequence, draft)
        if count < sequence.num_pending:
            draft.owed += max(sequence.most_pages(self.config) - sequence.table.num_pages, 0)

    def _repeat(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan what the model repeats of a sequence, for its policy to see, if it can get the pages for that."""
        ids, count = self._pruning.repetition(sequence, draft)
        if not count or (len(ids) > sequence.table.room and not self._growth.grow(sequence, len(ids), draft)):
            return
        draft.add(sequence, sequence.plan_repetition(ids, count))
        self._pruning.order_if_due(sequence, draft)

    def _preempt(self, sequence: SequenceState, changes: bool = False) -> None:
        """Take back pages and slot; what was not swapped out is recomputed when the sequence re-enters.

        One that `changes` in this plan, because it compacts or has just got its slot, cannot be swapped out by it: what
        the engine has there is not what its table says yet.
        """
        self._growth.shed(sequence)
        if not changes:
            self._cache.swaps.swap_out(sequence, self._swap_costs)
        self._pruning.preempted(sequence)
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self._preemptions += 1
        self._waiting.add(sequence)

    def _start(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Plan the first tokens of a sequence that has just got a slot."""
        self._waiting.start(sequence, now := self._clock())
        self._pruning.entered(sequence)
        if sequence.started_at is None:
            sequence.started_at = now
            self._policy.started(sequence)
            self._oversight.started(sequence)
        self._continue(sequence, draft)

    def _commit_decodes(self, decodes: Decodes, members: list[SequenceState], output: StepOutput) -> list[StepEvent]:
        """Apply the results of the decode batch: all at once but for those that end by them or were aborted."""
        if not members:
            return []
        over = self._decodes.settle(decodes, output).tolist()
        ending = [(members[row], output.of_decode(row)) for row in over]
        counts = 1 if output.runs is None else output.runs.counts
        # Also of those that are over: they are published once they are settled.
        full = decodes.starts % self.config.page_size + counts >= self.config.page_size
        filled = [members[row] for row in np.flatnonzero(full).tolist()]
        events, generated = accept(decodes, members, over, output)
        self._generation_tokens += len(generated)
        self._policy.generated(generated)
        for sequence in filled:
            self._cache.publish(sequence)
        for sequence, result in ending:
            sequence.in_flight = 0 if decodes.drafts is not None else sequence.in_flight - 1
            self._decodes.leave(sequence)
            events += self._settle(sequence, 1, result)
        return events

    def _settle(self, sequence: SequenceState, count: int, result: SequenceOutput) -> list[Event]:
        """Apply the result of one sequence that computed `count` known tokens, which are no longer in flight."""
        if sequence.done:
            if not sequence.in_flight:
                self._leave(sequence)
            return []
        if result.error is not None:
            self._cache.withdraw(sequence)
            return [self._fail(sequence.request.id, GenerationError(result.error))]
        # What is accepted is known before its entries count: a full block's name comes from its tokens.
        taken, reason = append(sequence, result)
        self._prompt_tokens += sequence.advance(count + max(min(taken, len(result.token_ids)) - 1, 0))
        self._cache.publish(sequence)
        self._cache.pins.pin(sequence)
        if count > 1 and self.config.row_windows is not None:
            # A long chunk leaves much behind the window: look at it in the next step, not when a page is full.
            sequence.table.room = 0
        sequence.num_scored += len(result.prompt_logprobs)
        self._generation_tokens += taken
        self._policy.generated([sequence] * taken)
        events = news(sequence, result, taken, reason, self.config)
        if reason is not None:
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
            self._oversight.ended(sequence.request.id)
        self._retire(sequence)

    def _fail(self, request_id: RequestId, error: QuireError) -> Failed:
        """End a request with an error."""
        self.abort(request_id)
        return Failed(request_id, describe(error))

    def _retire(self, sequence: SequenceState) -> None:
        """End a sequence; what is in flight keeps slot and pages until the commit, for the engine writes there."""
        sequence.done = True
        self._oversight.watchdog.left(sequence)
        self._decodes.leave(sequence)
        if sequence.slot is None:
            self._waiting.remove(sequence)
            self._cache.swaps.discard(sequence)
        elif not sequence.in_flight:
            self._leave(sequence)
        self._policy.left(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        """Take back slot and pages."""
        assert sequence.slot is not None
        self._decodes.leave(sequence)
        self._cache.leave(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.ahead = sequence.in_flight = 0
        self._running.remove(sequence)
