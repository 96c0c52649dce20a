"""A stand-in for the engine that stores tokens in real pages and "computes" by reading them back through its tables.

Its next token is a hash of the seed, the position and, per head, all (position, token) entries that the head sees.
So a page that is written by two sequences, dropped too early, hung in at the wrong place or not recomputed after a
preemption changes the text; `expected_output` says without any pages what the text must be.

It is told which pages are published, that is, may be read by sequences to come: none of them may ever change, nor be
lent as a fresh one, and a sequence may only begin with those that hold its own tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quire.core.plan import (
    NO_TOKEN,
    BatchPlan,
    Compaction,
    Decodes,
    PageDuplicates,
    PageGrants,
    PruneOrder,
    Runs,
    SequenceOutput,
    SequencePlan,
    SlotAssignment,
    StepOutput,
    TokenLogprob,
)
from quire.core.speculation import MAX_DRAFT_TOKENS
from quire.scheduler.scheduler import SchedulerConfig

from .fake_text import next_token


def parts(plan: BatchPlan) -> list[SequencePlan]:
    """All sequences of the batch, one by one: the steady decodes, then the others."""
    return list(plan.parts())


def step_output(plan: BatchPlan, results: Sequence[SequenceOutput], **more: Any) -> StepOutput:
    """The output of a step that gave its sequences these results: the steady decodes, then the others."""
    steady, runs = results[: len(plan.decodes)], None
    if plan.decodes.drafts is not None:
        width = max(1, *(len(result.token_ids) for result in steady))
        ids = [[*result.token_ids, *[NO_TOKEN] * (width - len(result.token_ids))] for result in steady]
        numbers = [(len(r.token_ids), r.drafted, r.model_drafted, r.branched) for r in steady]
        runs = Runs(np.array(ids, np.int32), *np.array(numbers, np.int32).T)
    return StepOutput(
        tuple(results[len(plan.decodes) :]),
        decoded=np.array([(NO_TOKEN, *result.token_ids)[-1] for result in steady], np.int32),
        recorded={row: result.recorded for row, result in enumerate(steady) if result.recorded},
        runs=runs,
        **more,
    )


class _Slot:
    """What the engine holds per slot."""

    def __init__(self, assignment: SlotAssignment, num_rows: int) -> None:
        self.assignment = assignment
        self.known = [*assignment.prompt_ids, *assignment.output_ids]
        self.computed = assignment.cached
        self.pages: list[list[int]] = [[] for _ in range(num_rows)]
        self.kept = [assignment.cached] * num_rows
        self.forgotten: list[set[int]] = [set() for _ in range(num_rows)]
        """Per head, positions that pruning dropped."""
        kept = assignment.kept if assignment.restored is None else assignment.restored.kept
        if kept is not None:
            self.kept = kept.tolist()


class FakeEngine:
    """Applies plans as the real engine does, and asserts everything that a plan promises."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.entries = np.full((config.num_pages, config.page_size, 2), -1, np.int32)
        self.host = np.full((config.num_host_pages, config.page_size, 2), -1, np.int32)
        self.parked: dict[int, _Slot] = {}
        """By ticket: what left, to be compared with what comes back."""
        self.slots: dict[int, _Slot] = {}
        self.failing_seeds: set[int] = set()
        """Sequences with these seeds fail when they sample."""
        self.scored: list[int] = []
        """Prompt tokens scored so far, of all sequences."""
        self.arriving: set[int] = set()
        """Pages that are published with this step's swap-ins."""
        self.published: dict[int, bytes] = {}
        """Pages that must not change, with their contents."""
        self.chosen: dict[int, list[list[int]]] = {}
        """Slot -> per head, indices of the entries to keep; of the last step."""
        self.rng = random.Random(0)
        self.right = 0.6
        """Chance that a draft token is what the sequence says there."""
        self.drafts = 0
        """Draft tokens verified so far."""
        self.compactions = self.duplicated = 0
        self.restored_after_pruning = self.began_pruned = 0

    def protect(self, pages: set[int], pruned: set[int] | None = None) -> None:
        """Say which pages are published now; those that were before must still be what they were.

        pruned: those of them that need not be full.
        """
        for page, contents in self.published.items():
            assert self.entries[page].tobytes() == contents, "a published page was written"
        for page in pages - self.published.keys():
            filled = self.entries[page, :1] if page in (pruned or ()) else self.entries[page]
            assert (filled >= 0).all(), "a page was published that is not full"
        self.published = {page: self.entries[page].tobytes() for page in pages}

    def step(self, plan: BatchPlan) -> StepOutput:
        """Compute one batch; tokens that are not known yet are those sampled last."""
        plan = replace(plan, decodes=self._known(plan.decodes))
        assert plan.num_tokens <= self.config.max_batch_tokens and (plan.num_tokens or plan.prunes or plan.compactions)
        self._leave(plan)
        for compaction in plan.compactions:
            self._compact(compaction)
        self.chosen.clear()
        assert len({part.slot for part in parts(plan)}) == len(parts(plan))
        for assignment in plan.assignments:
            assert 0 <= assignment.slot < self.config.max_num_seqs
            self.slots[assignment.slot] = _Slot(assignment, self.config.num_rows)
        self._hang_in(plan.shares)
        self.entries[plan.swap_ins.device] = self.host[plan.swap_ins.host]
        self._duplicate(plan.duplicates)
        self._check_shares(plan)
        self._apply_page_changes(plan)
        self._check_owners(plan)
        results = [self._compute(part) for part in parts(plan)]
        assert not any(result.logprobs for result in results[: len(plan.decodes)]), "a steady decode wants more"
        kept = tuple(self._choose(order) for order in plan.prunes)
        seconds = (0.5,) * len(kept)
        return step_output(
            plan,
            results,
            kept=kept,
            prune_seconds=seconds,
            foreseen=np.full(len(results), MAX_DRAFT_TOKENS, np.int32) if plan.foresee else None,
        )

    is_asynchronous = False

    def launch(self, plan: BatchPlan) -> StepOutput:
        """Compute one batch, for the loop."""
        return self.step(plan)

    def finish(self, launched: StepOutput) -> StepOutput:
        """`launch` has done everything."""
        return launched

    def _known(self, decodes: Decodes) -> Decodes:
        """With the tokens filled in that the scheduler could not know."""
        newest = np.array([self.slots[slot].known[-1] for slot in decodes.slots.tolist()], np.int32)
        return replace(decodes, token_ids=np.where(decodes.token_ids == NO_TOKEN, newest, decodes.token_ids))

    def _choose(self, order: PruneOrder) -> np.ndarray:
        """Any entries, any number of them per head, about as many as ordered."""
        slot = self.slots[order.slot]
        assert slot.assignment.prune is not None and order.target >= 1 and slot.computed
        self.chosen[order.slot] = choices = []
        for row, kept in enumerate(slot.kept):
            count = min(kept, max(1, order.target + self.rng.choice([-1, 0, 0, 1])))
            windowed = self.config.windows[row // self.config.num_kv_heads] is not None
            choices.append(list(range(kept)) if windowed else sorted(self.rng.sample(range(kept), count)))
        return np.array([len(choice) for choice in choices], np.int32)

    def _compact(self, compaction: Compaction) -> None:
        """Move what was chosen; read everything before anything is written."""
        slot, size = self.slots[compaction.slot], self.config.page_size
        choices = self.chosen[compaction.slot]
        assert compaction.counts.tolist() == [len(choice) for choice in choices]
        stays = [self._entries(slot, row)[choice] for row, choice in enumerate(choices)]
        held = [-(-len(entries) // size) for entries in stays]
        if compaction.pages is None:
            pages = [own[:count] for own, count in zip(slot.pages, held, strict=True)]
        else:
            assert len(compaction.pages) == sum(held)
            assert not {page for own in slot.pages for page in own} & set(compaction.pages.tolist())
            pages = [part.tolist() for part in np.split(compaction.pages, np.cumsum(held)[:-1])]
        for row, entries in enumerate(stays):
            assert not self.published.keys() & set(pages[row]), "a published page was compacted into"
            slot.forgotten[row] |= {int(p) for p in self._entries(slot, row)[:, 0]} - {int(p) for p in entries[:, 0]}
        slot.pages, slot.kept = pages, [len(entries) for entries in stays]
        for row, entries in enumerate(stays):
            where = np.arange(len(entries))
            self.entries[np.array(pages[row], np.int64)[where // size], where % size] = entries
        self.compactions += 1

    def _entries(self, slot: _Slot, row: int) -> np.ndarray:
        """What the head holds, int32 [kept, 2]."""
        return self.entries[slot.pages[row]].reshape(-1, 2)[: slot.kept[row]].copy()

    def _leave(self, plan: BatchPlan) -> None:
        """Copy out, all of it before anything else is written."""
        for park in plan.parks:
            self.parked[park.ticket] = self.slots[park.slot]
        for ticket in plan.unparked:
            del self.parked[ticket]
        outs = plan.swap_outs.host.tolist()
        assert len(outs) == len(set(outs)), "a host page is written twice"
        self.host[plan.swap_outs.host] = self.entries[plan.swap_outs.device]

    def _check_restored(self, slot: _Slot) -> None:
        """A sequence comes back with the entries that it left with, head by head."""
        assert slot.assignment.restored is not None
        left = self.parked.pop(slot.assignment.restored.ticket)
        assert slot.known == left.known
        # What a window no longer sees may have been dropped for the step from which the sequence was preempted.
        assert all(
            new == old or self._window(row) for row, (new, old) in enumerate(zip(slot.kept, left.kept, strict=True))
        )
        assert slot.assignment.restored.computed == left.computed
        self.restored_after_pruning += any(left.forgotten)
        slot.computed, slot.forgotten = left.computed, left.forgotten
        for row in range(self.config.num_rows):
            entries = self._entries(slot, row)
            positions = np.arange(left.computed - slot.kept[row], left.computed)
            if self._window(row) is None:
                positions = np.array([p for p in range(left.computed) if p not in left.forgotten[row]], np.int64)
            assert np.array_equal(entries, np.stack([positions, np.array(slot.known)[positions]], axis=1))

    def _apply_page_changes(self, plan: BatchPlan) -> None:
        for drop in plan.drops:
            slot = self.slots[drop.slot]
            for row in map(int, drop.rows):
                assert 0 < drop.pages * self.config.page_size <= slot.kept[row]
                del slot.pages[row][: drop.pages]
                slot.kept[row] -= drop.pages * self.config.page_size
        assert not self.published.keys() & set(plan.grants.pages.tolist()), "a published page was lent as a fresh one"
        self._take_off(plan.grants)
        self._hang_in(plan.grants)

    def _duplicate(self, pages: PageDuplicates) -> None:
        sources, targets = pages.sources.tolist(), pages.targets.tolist()
        assert len(set(targets)) == len(targets) and not set(targets) & set(sources)
        assert not self.published.keys() & set(targets), "a published page was copied into"
        self.entries[targets] = self.entries[sources]
        self.duplicated += len(targets)

    def _take_off(self, grants: PageGrants) -> None:
        """Empty pages from the first granted one on were given back before: they were only there for drafts."""
        for number, row, column in zip(
            grants.slots.tolist(), grants.rows.tolist(), grants.columns.tolist(), strict=True
        ):
            slot = self.slots[number]
            needed = -(-slot.kept[row] // self.config.page_size)
            if column < len(slot.pages[row]):
                assert column >= needed, "a page was hung in over another"
                del slot.pages[row][column:]

    def _hang_in(self, grants: PageGrants) -> None:
        assert all(array.dtype == np.int32 for array in (grants.slots, grants.rows, grants.columns, grants.pages))
        for number, row, column, page in zip(grants.slots, grants.rows, grants.columns, grants.pages, strict=True):
            pages = self.slots[int(number)].pages[int(row)]
            assert column == len(pages), "a page was hung in with a gap or over another"
            pages.append(int(page))

    def _check_shares(self, plan: BatchPlan) -> None:
        """Assigned slots begin with published pages that hold exactly their own first tokens, at every head."""
        assert set(plan.shares.slots.tolist()) <= {assignment.slot for assignment in plan.assignments}
        for slot in (self.slots[assignment.slot] for assignment in plan.assignments):
            if slot.assignment.restored is not None:
                self._check_restored(slot)
                continue
            cached = slot.assignment.cached
            if slot.assignment.kept is not None:
                self._check_pruned_prefix(slot)
                continue
            assert cached % self.config.page_size == 0 and cached < len(slot.known)
            wanted = np.stack([np.arange(cached), slot.known[:cached]], axis=1)
            for pages in slot.pages:
                assert len(pages) * self.config.page_size == cached
                assert self.published.keys() | self.arriving >= set(pages)
                assert np.array_equal(self.entries[pages].reshape(-1, 2), wanted), "a prefix of other tokens"

    def _check_pruned_prefix(self, slot: _Slot) -> None:
        """A slot begins with some entries of its own tokens at every head: full pages published, the last one not."""
        prune, size = slot.assignment.prune, self.config.page_size
        assert prune is not None and slot.computed == prune.context < len(slot.known)
        known = np.array(slot.known)
        for row, pages in enumerate(slot.pages):
            positions, tokens = self._entries(slot, row).T
            assert len(pages) == -(-slot.kept[row] // size) and 0 < slot.kept[row] <= prune.context
            assert (np.diff(positions) > 0).all() and positions[-1] < prune.context
            assert (tokens == known[positions]).all(), "a pruned prefix of other tokens"
            full = slot.kept[row] // size
            assert self.published.keys() | self.arriving >= set(pages[:full])
            assert not self.published.keys() & set(pages[full:]), "a page that two would write"
            slot.forgotten[row] = set(range(prune.context)) - set(positions.tolist())
        self.began_pruned += 1

    def _check_owners(self, plan: BatchPlan) -> None:
        """Slots of the batch share only published pages (idle slots are checked when they are next in a batch)."""
        tables = [self._own_pages(self.slots[part.slot], len(part.token_ids) + part.drafts) for part in parts(plan)]
        assert all(len(pages) == len(set(pages)) for pages in tables), "a page is twice in a table"
        own = [page for pages in tables for page in pages if page not in self.published.keys() | self.arriving]
        assert len(own) == len(set(own)), "a page has two owners"

    def _own_pages(self, slot: _Slot, count: int) -> list[int]:
        """Pages of all heads that hold something, or will when `count` entries more are written."""
        size = self.config.page_size
        rows = zip(slot.pages, slot.kept, strict=True)
        return [page for pages, kept in rows for page in pages[: -(-(kept + count) // size)]]

    def _compute(self, part: SequencePlan) -> SequenceOutput:
        """Write and answer; then the same for one draft token after the other, as long as they are right.

        All draft entries are written first, before any is verified, as the real engine does; so each must have a page.
        """
        slot, answer = self.slots[part.slot], SequenceOutput()
        if not part.drafts:
            self._write(part)
            return self._result(part)
        assert part.sample and len(part.token_ids) == 1 and not part.score_ids and not part.scratch
        assert len(slot.known) + part.drafts < slot.assignment.max_length, "a draft past the end"
        count = self.rng.randint(0, part.drafts) if self.rng.random() < 0.3 else part.drafts
        guesses = [NO_TOKEN] * count
        self._write(replace(part, token_ids=part.token_ids + tuple(guesses), drafts=0), committed=1)
        for place in range(count + 1):
            step = self._result(part)
            if step.error is not None:
                return step
            answer = replace(
                step,
                token_ids=answer.token_ids + step.token_ids,
                logprobs=answer.logprobs + step.logprobs,
                recorded=answer.recorded + step.recorded,
            )
            if place == count or self.rng.random() > self.right:
                break
            self._write(SequencePlan(part.slot, slot.computed, step.token_ids, sample=True))
        self.drafts += count
        return replace(answer, drafted=count)

    def _write(self, part: SequencePlan, committed: int | None = None) -> None:
        slot, count = self.slots[part.slot], len(part.token_ids)
        assert count >= 1 and part.start == slot.computed, "positions are not consecutive"
        stays = 0 if part.scratch else count if committed is None else committed
        assert part.scratch or list(part.token_ids)[:stays] == slot.known[part.start : part.start + stays], (
            "other tokens than the known ones"
        )
        assert part.sample == (not part.scratch and part.start + stays == len(slot.known))
        prompt = slot.assignment.prompt_ids
        if part.score_ids:
            assert slot.assignment.params.prompt_logprobs is not None
            assert part.score_ids == prompt[part.start + 1 : part.start + 1 + count]
        new = np.stack([np.arange(part.start, part.start + count), part.token_ids], axis=1)
        size = self.config.page_size
        for row in range(self.config.num_rows):
            where = np.arange(slot.kept[row], slot.kept[row] + count)
            pages = np.array(slot.pages[row], np.int64)
            assert where[-1] < len(pages) * size, "no page for a new entry"
            written = pages[where // size]
            assert not self.published.keys() & set(written.tolist()), "a write into a published page"
            self.entries[written, where % size] = new
            slot.kept[row] += stays
        slot.computed += stays

    def _result(self, part: SequencePlan) -> SequenceOutput:
        slot = self.slots[part.slot]
        self.scored += part.score_ids
        prompt_logprobs = tuple(TokenLogprob(token, -1.0, ()) for token in part.score_ids)
        if not part.sample:
            return SequenceOutput(prompt_logprobs=prompt_logprobs)
        assignment = slot.assignment
        if assignment.seed in self.failing_seeds:
            slot.known.append(0)
            return SequenceOutput(error="the logits are not finite")
        generated = len(slot.known) - len(assignment.prompt_ids)
        blocked = set(assignment.stop_ids) if generated < assignment.params.min_tokens else set()
        token = next_token(assignment.seed, self._views(slot), blocked, self.config.vocab_size)
        slot.known.append(token)
        logprobs = (TokenLogprob(token, -0.5, ((token, -0.5),)),) if assignment.params.logprobs is not None else ()
        recorded = (str(token).encode(),) if assignment.record else ()
        return SequenceOutput((token,), logprobs, prompt_logprobs, recorded=recorded)

    def _window(self, row: int) -> int | None:
        return self.config.windows[row // self.config.num_kv_heads]

    def _views(self, slot: _Slot) -> list[np.ndarray]:
        """Per head, the (position, token) entries that the newest token's query sees, as read from the pages."""
        views = []
        for row in range(self.config.num_rows):
            window = self._window(row)
            entries = self._entries(slot, row)
            assert (entries[:, 1] == np.array(slot.known)[entries[:, 0]]).all(), "an entry of another sequence"
            if window is None:
                expected = [p for p in range(slot.computed) if p not in slot.forgotten[row]]
                assert entries[:, 0].tolist() == expected, "other entries than those that were kept"
            if window is not None:
                entries = entries[slot.computed - 1 - entries[:, 0] < window]
            views.append(entries)
        return views
