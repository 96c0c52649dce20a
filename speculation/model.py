"""`ModelDrafter`: a small model proposes, over a paged cache of its own.

Its cache follows the history when it is asked to propose: what it has stored counts as far as the tokens are those that
the sequence came to have (drafts that were accepted); a slot that holds nothing begins with the blocks that others left
of the same tokens; the rest is computed. A sequence that is far behind (a fresh prompt, a slot that did not speculate
for a while) catches up over several steps and proposes nothing meanwhile.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.plan import IntArray
from ..core.speculation import MAX_DRAFT_TOKENS, CaughtUp, DraftMethod
from ..models.context import AttentionContext
from ..models.loading import weight_bytes
from ..models.placement import Placement
from ..models.runner import ModelRunner
from .chain import draft_chain, no_proposals, single_rows, to_proposals
from .draft_cache import DraftCache, DraftLayout
from .draft_prefixes import DraftPrefixes
from .drafter import Draw, Proposals
from .history import TokenHistory

CATCH_UP_TOKENS = 2048
"""Most tokens of one step's first pass; the target's step waits for it."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What one call computes, for the sequences that take part: first those that propose, in descending order of
    `most`, then those that only catch up. Arrays [S], indices of `members` into the sequences asked."""

    members: IntArray
    slots: IntArray
    stored: IntArray
    """Valid entries."""
    feed: IntArray
    """Tokens of the first pass, at least one."""
    most: IntArray
    """[R <= S]: of those that propose, tokens wanted."""
    cached: int
    """Entries that were found in the cache, for those who begin."""


class ModelDrafter:
    """Fulfils `Drafter` and `Memory`. Letters as in `models.context`; N slots, V vocabulary of the target."""

    method: DraftMethod = "model"

    def __init__(self, runner: ModelRunner, layout: DraftLayout, place: Placement, target: ModelRunner) -> None:
        """The layout's `max_length` is lowered to what the draft was trained for."""
        self._place, self._target, self._layout = place, target, layout
        self._tail: IntArray = np.zeros((layout.num_slots, MAX_DRAFT_TOKENS), np.int32)
        """[N, k]: tokens whose entries lie behind the stored ones: drafts, of which verification has yet to tell."""
        self._tail_length: IntArray = np.zeros(layout.num_slots, np.int32)
        self._install(runner)

    def _install(self, runner: ModelRunner) -> None:
        self._limit = min(self._layout.max_length, runner.spec.max_context)
        layout = DraftLayout(self._layout.num_slots, self._limit, self._layout.page_size, self._layout.capacity)
        self.cache = DraftCache(layout, runner.spec, self._place)
        self._prefixes = DraftPrefixes(self.cache)
        vocab = self._target.spec.vocab_size
        self._weights = weight_bytes(runner, self._target)
        self._model = runner
        self._runner = runner if runner.spec.vocab_size == vocab else _FittedRunner(runner, vocab)
        self._tail_length[:] = 0

    def replace(self, runner: ModelRunner) -> ModelRunner:
        """Draft with another model from now on, and return the old one; what that has stored is forgotten.

        Between steps only. Raises `ConfigError` where there is no memory for the new one's cache: then the old one,
        which makes room first, drafts on with an empty cache.
        """
        old = self._model
        del self.cache, self._prefixes
        try:
            self._install(runner)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self._install(old)
            raise ConfigError(
                f"the draft's cache could not be allocated: {str(error).splitlines()[0]}", param="draft"
            ) from error
        return old

    @property
    def num_slots(self) -> int:
        """N."""
        return self._layout.num_slots

    @property
    def num_bytes(self) -> int:
        """See `Drafter`."""
        return self._weights + self.cache.num_bytes

    def assign(self, slot: int) -> None:
        """See `Drafter`."""
        self.cache.release(slot)
        self._prefixes.forget(slot)
        self._tail_length[slot] = 0

    def clear(self) -> None:
        """See `Drafter`."""
        self.cache.clear()
        self._prefixes.clear()
        self._tail_length[:] = 0

    def recall(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """See `Memory`."""
        return self._prefixes.tokens(self._prefixes.find(history, slots), slots)

    @torch.inference_mode()
    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`. Nothing is proposed past the context of the draft, nor where its pages are short."""
        this = self._plan(history, slots, most)
        if not len(this.slots):
            return no_proposals(most)
        logits, context = self._first_pass(history, this)
        entries = this.stored + this.feed
        self.cache.stored[this.slots] = entries
        # The newest entry may be computed once more: nobody else may read it yet.
        self._prefixes.publish(history, this.slots, np.minimum(entries, history.known[this.slots] - 1))
        caught_up = CaughtUp(this.cached, int(this.feed.sum()))
        proposing = len(this.most)
        if not proposing:
            return replace(no_proposals(most), caught_up=caught_up)
        members, ready = this.members[:proposing], this.slots[:proposing]
        lengths = torch.full((proposing,), self._limit, device=self._place.device)
        drawn = draft_chain(self._runner, logits, context, lengths, members, this.most, draw)
        proposals = to_proposals(drawn, members, this.most, most)
        self._tail[ready, : len(drawn)] = proposals.tokens[members, : len(drawn)]
        self._tail_length[ready] = this.most - 1  # the last token was drawn, not fed
        return replace(proposals, caught_up=caught_up)

    def _plan(self, history: TokenHistory, slots: IntArray, most: IntArray) -> _Round:
        known = history.known[slots]
        stored = self._valid(history, slots, known)
        # Nothing that a failure leaves half done may count later.
        self.cache.stored[slots], self._tail_length[slots] = stored, 0
        most = np.minimum(np.minimum(most, self._limit - known), MAX_DRAFT_TOKENS)
        found = self._prefixes.find(history, slots[most > 0])
        if found:
            stored = stored + self._prefixes.tokens(found, slots)
        missing = known - stored
        # Those that lack least come first, so that nobody's prompt keeps the others from proposing.
        order = np.argsort(missing, kind="stable").astype(np.int32)
        order = order[most[order] > 0]
        order = order[self._prefixes.ready(history, slots[order], missing[order], CATCH_UP_TOKENS)]
        missing = missing[order]
        feed = np.minimum(np.maximum(CATCH_UP_TOKENS - (missing.cumsum() - missing), 0), missing)
        ready = feed == missing
        entries = stored[order] + feed + np.where(ready, most[order] - 1, 0)
        order, feed, ready, entries = (part[feed > 0] for part in (order, feed, ready, entries))
        granted = self.cache.reserve(slots[order], entries, found)
        order, feed, ready = order[granted], feed[granted], ready[granted]
        cached = int(self._prefixes.tokens(found, slots[order]).sum()) if found else 0
        first = np.lexsort((-most[order], ~ready))
        order, feed, proposing = order[first], feed[first], int(ready.sum())
        return _Round(order, slots[order], stored[order], feed, most[order[:proposing]], cached)

    def _valid(self, history: TokenHistory, slots: IntArray, known: IntArray) -> IntArray:
        """Entries [S] whose tokens are the sequences' own, short of the newest token: that is computed in any case."""
        stored, count = self.cache.stored[slots], np.where(self.cache.held[slots] > 0, self._tail_length[slots], 0)
        width = int(count.max(initial=0))
        if width:
            columns = np.arange(width)
            at = stored[:, None] + columns
            there = np.minimum(at, history.tokens.shape[1] - 1)
            same = (history.tokens[slots[:, None], there] == self._tail[slots, :width]) & (columns < count[:, None])
            stored = stored + (same & (at < known[:, None])).cumprod(1).sum(1, dtype=np.int32)
        return np.minimum(stored, known - 1)

    def _first_pass(self, history: TokenHistory, this: _Round) -> tuple[Tensor, AttentionContext]:
        """Compute the tokens that the cache lacks; logits [R, V] of those that propose, and the context to go on in."""
        count, proposing, ends = len(this.slots), len(this.most), this.feed.cumsum()
        order = np.arange(ends[-1]) - (ends - this.feed).repeat(this.feed)
        positions = this.stored.repeat(this.feed) + order
        ids = history.tokens[this.slots.repeat(this.feed), positions]
        entries = this.stored + this.feed
        parts = (ids, positions, this.slots, this.stored, [0], ends, ends[:proposing] - 1, entries[:proposing])
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self._place.device)
        sizes = [len(ids), len(ids), count, count, count + 1, proposing, proposing]
        tokens, places, slots, stored, starts, rows, reached = packed.split(sizes)
        longest = int(entries.max())
        longest_drafted = int((entries[:proposing] + this.most - 1).max(initial=longest))
        table, kept = self.cache.tables(slots, stored, longest_drafted)
        context = AttentionContext(
            pool=self.cache.pool,
            entry_positions=self.cache.entry_positions,
            page_table=table,
            kept=kept,
            query_start=starts.int(),
            query_lengths=tuple(this.feed.tolist()),
            positions=places,
            destinations=None,
            max_kept=longest,
            backend=self._place.backend,
        )
        logits = self._runner.forward(tokens, places, torch.full_like(places, self._limit), context, rows)
        drafted = table[:proposing], self.cache.lengths(reached)
        pool, entry_positions, backend = self.cache.pool, self.cache.entry_positions, self._place.backend
        return logits, single_rows(pool, entry_positions, drafted, reached, longest_drafted, backend)


class _FittedRunner:
    """A draft whose vocabulary is padded to another width than the target's; fulfils `ModelRunner`."""

    def __init__(self, runner: ModelRunner, vocab_size: int) -> None:
        self._runner, self._vocab = runner, vocab_size
        self.spec, self.rope = runner.spec, runner.rope
        self.output_weight = runner.output_weight

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, context: AttentionContext, logit_rows: Tensor
    ) -> Tensor:
        """See `ModelRunner.forward`; logits [R, V] of the target's V, what the draft lacks is never drawn."""
        known = input_ids.clamp(max=self.spec.vocab_size - 1)
        logits = self._runner.forward(known, positions, lengths, context, logit_rows)
        missing = self._vocab - logits.shape[1]
        return (
            logits[:, : self._vocab] if missing < 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        )
