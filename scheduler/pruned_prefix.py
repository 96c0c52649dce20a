"""Pruned prefixes: what is left of a context once it is pruned, for others to begin with.

What stays of the leading `PruneParams.context` tokens depends on them, on the model and on how it is pruned, never on
what follows. So it has a name made of exactly that, and is one bundle in the prefix index: pages of unequal number per
head, used, reclaimed, pinned and copied to the host as any other. Its last pages may be partly filled, and a
sequence goes on filling: so each user has these for itself.

    head 0    [ full ][ full ][ part ]        the bundle: never written
    head 1    [ full ][ part ]
    user      [ full ][ full ][ copy ][ own ] the same full pages, then its own
              [ full ][ copy ][ own  ]

Where prompts are pruned chunk by chunk, what stays may depend on where the chunks ended. What is published is what one
request was answered with.
"""

from collections.abc import Callable

import numpy as np

from ..core.plan import IntArray, PageDuplicates
from ..core.prefix import Bundle, PrefixIndex
from .config import SchedulerConfig
from .sequence import SequenceState
from .table import pages_of


def _partial(kept: IntArray, page_size: int) -> IntArray:
    """Which pages of heads with `kept` [R] entries, head after head, are partly filled: their numbers."""
    ends = np.cumsum(-(-kept // page_size)) - 1
    return ends[kept % page_size > 0].astype(np.int32)


class PrunedPrefixes:
    """Publishes what is left of contexts and lets others begin with it; bundles are the index's."""

    def __init__(self, config: SchedulerConfig, index: PrefixIndex, take: Callable[[int], IntArray]) -> None:
        """`take` lends pages, see `CacheManager.take`."""
        self._config = config
        self._index = index
        self._take = take
        self._offered: dict[SequenceState, Bundle] = {}
        """Published by the plan that is being made, which fills them: not to be found before the next."""
        self._duplicates: dict[SequenceState, PageDuplicates] = {}
        """What that plan copies."""
        self.hits = 0
        """Prompt tokens found so, of sequences that started for the first time."""

    def find(self, sequence: SequenceState) -> Bundle | None:
        """What a waiting sequence can begin with; not if it then outgrew the pool, or must score what it skips."""
        key, prune = sequence.pruned_key, sequence.prune
        bundle = self._index.get(key) if key is not None else None
        if bundle is None or prune is None or prune.context(len(sequence.tokens)) > sequence.first_unscored:
            return None
        together = bundle.size + self._own_pages(sequence, bundle)
        return bundle if together <= self._config.num_pages else None

    def awaits(self, sequence: SequenceState, other: SequenceState) -> bool:
        """Whether what a waiting sequence could begin with is about to be left over by `other`."""
        return self.is_due(other) and other.pruned_key == sequence.pruned_key and sequence.swapped is None

    def is_due(self, sequence: SequenceState) -> bool:
        """Whether a running sequence has yet to leave over what others can begin with, or just does."""
        prune = sequence.prune
        if prune is None or sequence.pruned_key is None:
            return False
        before = not prune.context_done and sequence.num_computed <= prune.prefill_end
        return before or sequence in self._offered

    def cost(self, sequence: SequenceState, bundle: Bundle) -> int:
        """How many of the available pages a sequence takes that begins so, until all its known tokens are computed."""
        in_use = bundle.pages is not None and (bundle.users or bundle.pinned)
        return self._own_pages(sequence, bundle) + (0 if in_use else bundle.size)

    def _own_pages(self, sequence: SequenceState, bundle: Bundle) -> int:
        """Most pages that a waiting sequence then holds beside the bundle's."""
        assert bundle.kept is not None and sequence.prune is not None
        behind = len(sequence.tokens) - sequence.prune.context(len(sequence.tokens))
        return pages_of(bundle.kept + np.int32(behind), self._config.page_size) - int(
            (bundle.kept // self._config.page_size).sum()
        )

    def begin(self, sequence: SequenceState, bundle: Bundle) -> None:
        """Let a sequence begin with a bundle that is on the device and counts it as a user."""
        assert bundle.pages is not None and bundle.kept is not None
        parts, pages = _partial(bundle.kept, self._config.page_size), bundle.pages.copy()
        pages[parts] = self._take(len(parts))
        self._duplicates[sequence] = PageDuplicates(bundle.pages[parts], pages[parts])
        sequence.begin_pruned(bundle, pages, self._config.page_size)

    def publish(self, sequence: SequenceState, spare: int) -> None:
        """A sequence was pruned just now: if its context was, that is for others from the next plan on.

        Its pages become the bundle's, but for the partly filled ones, of which the bundle gets copies; not if that
        takes more than `spare` pages. In the same plan the sequence may still lose its slot, and all is as if
        nothing had been published.
        """
        key, state, table = sequence.pruned_key, sequence.prune, sequence.table
        if key is None or state is None or state.context_done or sequence.num_computed != state.prefill_end:
            return
        kept, pages = table.kept, table.ids()
        parts = _partial(kept, self._config.page_size)
        if len(parts) > spare or self._index.get(key) is not None:
            return
        own = pages[parts]
        pages[parts] = self._take(len(parts))
        self._duplicates[sequence] = PageDuplicates(own, pages[parts])
        sequence.base = self._offered[sequence] = Bundle(key, pages, users=1, kept=kept)
        table.borrowed[:] = kept // self._config.page_size

    def own(self, sequence: SequenceState) -> IntArray:
        """The bundle that the sequence alone used is its own; returns the pages that it does not need."""
        base = sequence.base
        assert base is not None and base.kept is not None and base.pages is not None and base.users == 1
        self.forget(sequence)
        sequence.base = None
        sequence.table.borrowed[:] = 0
        return base.pages[_partial(base.kept, self._config.page_size)]

    def forget(self, sequence: SequenceState) -> None:
        """The plan that is being made does nothing for the sequence: it leaves."""
        self._offered.pop(sequence, None)
        self._duplicates.pop(sequence, None)

    def check(self, sequence: SequenceState) -> None:
        """AssertionError unless the sequence's table begins with the full pages of its bundle."""
        base, table = sequence.base, sequence.table
        assert base is not None and base.kept is not None and base.pages is not None
        rows, columns, pages = table.places()
        full = np.delete(base.pages, _partial(base.kept, self._config.page_size))
        assert np.array_equal(table.borrowed, base.kept // self._config.page_size)
        assert np.array_equal(pages[columns < table.borrowed[rows]], full), "a pruned prefix was changed"

    def take(self) -> PageDuplicates:
        """What the plan that is made now copies; what it publishes can be found from here on."""
        for bundle in self._offered.values():
            if self._index.get(bundle.digest) is None:
                self._index.adopt(bundle)
        pairs = list(self._duplicates.values())
        self._offered.clear()
        self._duplicates.clear()
        if not pairs:
            return PageDuplicates.none()
        return PageDuplicates(np.concatenate([p.sources for p in pairs]), np.concatenate([p.targets for p in pairs]))
