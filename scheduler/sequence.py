"""`SequenceState`: all that the scheduler knows of one choice of one request."""

from dataclasses import dataclass, field

import numpy as np

from ..core.ids import SlotId
from ..core.plan import MAX_FORCED_TOKENS, IntArray, Restored, SequencePlan, SlotAssignment
from ..core.prefix import BlockHashes, Bundle
from ..core.pruning import CacheUse
from ..core.request import Request
from .config import SchedulerConfig
from .footprint import longest, most_entries
from .prune_state import NEVER, PruneState, prune_state
from .pruned_key import pruned_key
from .swap import SwappedTable
from .table import NO_WINDOW, PageTable, pages_of

MAX_SCORED_ROWS = 256
"""Most prompt tokens scored in one step: 150 MB of float32 logits at a vocabulary of 150,000."""
_MASK = 2**64 - 1


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice `index`: the request's own for the first, a 64-bit mix of both for the others.

    The mix is splitmix64's output function (Steele, Lea, Flood 2014), so neighbours share no bits.
    """
    if index == 0:
        return seed & _MASK
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(slots=True, eq=False)
class SequenceState:
    """One choice of a request from arrival to end. Mutable; owned by the scheduler.

    It has two lengths: `num_computed` is logical and gives positions; the kept lengths per head give what is stored.
    They part where a window or pruning forgets entries.
    """

    request: Request
    index: int
    """Which of the `n` choices."""
    arrival: int
    """Order of arrival, unique; the larger, the younger."""
    arrived_at: float
    """Clock time in seconds."""
    seed: int
    stop_ids: tuple[int, ...]
    """Tokens that end the sequence."""
    max_length: int
    """Most tokens, prompt included."""
    most_positions: int
    """To which its queries and keys are rotated: fewer than `max_length` where positions close up."""
    table: PageTable
    tokens: list[int]
    """All known tokens: the prompt, then the output."""
    namespace: tuple[object, ...]
    """Prefixes are reused within one alone."""
    hashes: BlockHashes
    """Of the full blocks of `tokens`, within the namespace."""
    num_prompt: int
    num_computed: int = 0
    """Leading tokens whose keys and values were computed since the sequence (re-)entered."""
    most_computed: int = 0
    """The same over its whole life, up to the prompt's end: what lies below is recomputation."""
    num_scored: int = 0
    """Prompt log-probabilities already delivered: those of tokens 1 to `num_scored`."""
    slot: SlotId | None = None
    """Lent while it runs; None while it waits and after its end."""
    steady: bool = False
    """A member of the decode batch."""
    in_flight: int = 0
    """Its tokens in the steps between plan and commit; 0 if it has none there."""
    started_at: float | None = None
    """Clock time of the first step that worked on it."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had at the first start."""
    blocks: list[Bundle | None] = field(default_factory=list)
    """Of each full block of the table whether it is in the prefix cache; None: its pages are the sequence's own."""
    shares: bool = False
    """Whether it publishes its blocks and begins with others': not with sliding windows, whose pages go one head at a
    time; not if it would not fit the pool unpruned; without prefix cache only among the choices of one request."""
    base: Bundle | None = None
    """The pruned prefix that its table begins with: the full pages of that are not its own. None from its next prune
    on."""
    pruned_key: bytes | None = None
    """Name of what is left of its context, if others may begin with that."""
    pinned_tokens: int | None = None
    """Prompt tokens pinned for after its end; None: not decided yet."""
    pinned: list[bytes] = field(default_factory=list)
    """Digests of the prefixes that they are in."""
    swapped: SwappedTable | None = None
    """What it comes back with, while it waits swapped out."""
    prune: PruneState | None = None
    """None: it forgets nothing."""
    ahead: int = 0
    """Entries for which it may hold pages beyond those computed or in flight: drafts that were wrong had them."""
    done: bool = False
    """Ended or aborted; a done sequence in flight still holds slot and pages until the last commit."""

    @staticmethod
    def create(request: Request, index: int, arrival: int, now: float, config: SchedulerConfig) -> "SequenceState":
        """Choice `index` of a request that passed the admission checks; `now` in seconds."""
        params = request.params
        ends = () if params.ignore_eos else config.eos_token_ids
        num_prompt, tokens = len(request.prompt_ids), list(request.prompt_ids)
        # What fits only because it is pruned gets as long as that only where it is asked for.
        most = config.max_length if num_prompt < config.max_length else longest(request, config)
        max_length = most if params.max_tokens is None else num_prompt + params.max_tokens
        # Then all its pages are its own, so that none of its prunes is ever denied.
        fits_whole = max_length <= config.max_length
        most_positions = min(max_length, config.max_model_len)
        # Sequences whose keys are rotated differently must not share them.
        rotation = max(config.rope_length, most_positions) if config.rope_length else None
        namespace: tuple[object, ...] = (config.model, request.namespace, request.cache_salt, rotation)
        namespace = namespace if config.prefix_cache else (*namespace, request.id)
        shares = fits_whole and config.row_windows is None and (config.prefix_cache or params.n > 1)
        return SequenceState(
            request=request,
            index=index,
            arrival=arrival,
            arrived_at=now,
            seed=choice_seed(request.seed, index),
            stop_ids=tuple(sorted({*ends, *params.stop_token_ids})),
            max_length=max_length,
            most_positions=most_positions,
            table=PageTable(config.num_rows, config.page_size),
            tokens=tokens,
            namespace=namespace,
            hashes=BlockHashes(namespace, tokens, config.page_size),
            num_prompt=num_prompt,
            shares=shares,
            pruned_key=pruned_key(namespace, request, config) if shares else None,
            prune=prune_state(request, config),
        )

    @property
    def num_stored(self) -> int:
        """Tokens computed once the step in flight is."""
        repeats = self.prune is not None and self.prune.repeating
        return self.num_computed + (0 if repeats else self.in_flight)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet: 1 while it decodes, more while a prompt is (re)computed."""
        return len(self.tokens) - self.num_computed

    @property
    def decodes(self) -> bool:
        """Whether it waits for its next token, and not for a prompt; a grammar may have forced some before that."""
        may_be_forced = self.request.grammar is not None and self.num_generated > 0
        return self.num_pending <= (1 + MAX_FORCED_TOKENS if may_be_forced else 1)

    @property
    def decodes_plainly(self) -> bool:
        """Whether all it wants of the next step is one more token."""
        # What a step is to choose, or what is told of it, takes more than a column.
        plain = self.request.params.logprobs is None and len(self.tokens) < self.wakes
        return plain and self.num_pending == 1 and self.num_generated > 0

    @property
    def wakes(self) -> int:
        """Known tokens at which it must be looked at for pruning; until then it decodes like any other."""
        return NEVER if self.prune is None else self.prune.wakes

    @property
    def num_generated(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_exact(self) -> bool:
        """Whether it holds, or would recompute, exactly what the model gives for its tokens."""
        return self.prune is None or not self.prune.pruned

    def most_entries(self, config: SchedulerConfig) -> int:
        """Most entries that a head holds, on average, until all known tokens are computed, if no prune is denied."""
        known = len(self.tokens)
        if self.swapped is not None and self.prune is not None and config.policies[self.prune.params.policy].repeats:
            # It may go on with repeating, behind its own tokens.
            return max(known, min(config.max_length - 1, self.swapped.num_computed + config.max_batch_tokens))
        if self.prune is None or not self.prune.bounded:
            return known
        return most_entries(self.prune.params, config, known, self.prune.context(known))

    def most_pages(self, config: SchedulerConfig) -> int:
        """Most pages that it holds until all known tokens are computed, if no prune is denied."""
        if self.base is not None and self.base.kept is not None and self.prune is not None:
            behind = len(self.tokens) - self.prune.prefill_end
            return pages_of(self.base.kept + np.int32(behind), config.page_size)
        return config.pages_pruned(self.most_entries(config), len(self.tokens))

    def reusable_blocks(self, config: SchedulerConfig) -> int:
        """How many leading blocks may come from the prefix cache.

        The last known token is always computed: it gives the next one. So is what gives prompt log-probabilities that
        are yet to be delivered, and the tokens whose queries a pruning policy must observe.
        """
        block_size, entries = config.page_size, len(self.tokens) - 1
        if self.prune is not None:
            observes = config.policies[self.prune.params.policy].observes
            known = self.prune.context(len(self.tokens))
            observed = {"": 1, "newest": self.prune.params.window, "all": known}[observes]
            entries = max(known - observed, 0)
        return min(entries, self.first_unscored) // block_size

    @property
    def first_unscored(self) -> int:
        """Leading tokens whose rows need not be computed for prompt log-probabilities that are yet to be delivered."""
        scores = self.request.params.prompt_logprobs is not None and self.num_scored < self.num_prompt - 1
        return self.num_scored if scores else len(self.tokens)

    def begin_with(self, blocks: list[Bundle], pages: IntArray, block_size: int) -> None:
        """(Re-)enter with the leading `blocks` computed; `pages` [R, len(blocks)] are theirs."""
        self.table.adopt(pages)
        self.blocks = [*blocks]
        self._begin_at(len(blocks) * block_size)

    def begin_pruned(self, base: Bundle, pages: IntArray, page_size: int) -> None:
        """(Re-)enter with what is left of its context; `pages` are those of `base`, but for its own partly filled ones.

        Head after head, as the bundle's.
        """
        assert base.kept is not None and self.prune is not None
        self.table.rebuild(base.kept, pages)
        self.base, self.table.borrowed[:] = base, base.kept // page_size
        self.prune.begin_pruned()
        self._begin_at(self.prune.prefill_end)

    def _begin_at(self, computed: int) -> None:
        self.num_computed = computed
        self.most_computed = max(self.most_computed, min(computed, self.num_prompt))

    def come_back(self, found: list[Bundle], pages: IntArray) -> None:
        """Be again as it was when it was swapped out: with the shared blocks `found`, its own pages now in `pages`."""
        swapped = self.swapped
        assert swapped is not None
        columns = np.stack([bundle.pages for bundle in found if bundle.pages is not None], axis=1) if found else None
        empty = np.empty((len(swapped.held), 0), np.int32)
        self.table.restore(
            swapped.held, swapped.kept, list(swapped.shared), empty if columns is None else columns, pages
        )
        self.blocks = swapped.blocks(found)
        self.num_computed = swapped.num_computed

    def next_chunk(self, budget: int) -> int:
        """How many tokens to compute next, at most `budget`.

        A context that is pruned on its own is computed on its own.
        A recomputed prompt is cut where its log-probabilities were delivered: scores start with a chunk's first row.
        Scored chunks are short: each of their rows has logits over the whole vocabulary.
        """
        count = min(self.num_pending, budget)
        if self.prune is not None and self.num_computed < self.prune.prefill_end:
            count = min(count, self.prune.prefill_end - self.num_computed)
        if self.request.params.prompt_logprobs is None or self.num_scored >= self.num_prompt - 1:
            return count
        if self.num_computed < self.num_scored:
            return min(count, self.num_scored - self.num_computed)
        return min(count, MAX_SCORED_ROWS)

    def plan(self, count: int) -> SequencePlan:
        """This sequence's part of a batch: its next `count` known tokens."""
        assert self.slot is not None
        start, end = self.num_computed, self.num_computed + count
        scores: tuple[int, ...] = ()
        if self.request.params.prompt_logprobs is not None and start >= self.num_scored:
            scores = tuple(self.tokens[start + 1 : min(end + 1, self.num_prompt)])
        ids = tuple(self.tokens[start:end])
        return SequencePlan(self.slot, start, ids, end == len(self.tokens), scores)

    def plan_repetition(self, token_ids: tuple[int, ...], count: int) -> SequencePlan:
        """This sequence's part of a batch: tokens behind its own, which repeat `count` of them, only to be observed."""
        assert self.slot is not None and self.prune is not None
        self.prune.repeating = count
        return SequencePlan(self.slot, self.num_computed, token_ids, sample=False, scratch=True)

    def assignment(self) -> SlotAssignment:
        """What the engine must know when the sequence enters its slot."""
        assert self.slot is not None
        restored = None
        if self.swapped is not None:
            restored = Restored(self.swapped.ticket, self.swapped.kept, self.swapped.num_computed)
        return SlotAssignment(
            slot=self.slot,
            params=self.request.params,
            seed=self.seed,
            stop_ids=self.stop_ids,
            prompt_ids=self.request.prompt_ids,
            output_ids=tuple(self.tokens[self.num_prompt :]),
            max_length=self.most_positions,
            cached=0 if restored else self.num_computed,
            kept=None if self.base is None else self.table.kept,
            restored=restored,
            prune=self.request.prune,
            record=self.request.record,
            grammar=self.request.grammar,
            namespace=self.namespace,
        )

    def advance(self, count: int) -> int:
        """`count` more tokens are computed and stored; returns how many prompt tokens that were for the first time."""
        self.table.append(count)
        self.num_computed += count
        fresh = min(self.num_computed, self.num_prompt) - self.most_computed
        self.most_computed = max(self.most_computed, min(self.num_computed, self.num_prompt))
        return max(fresh, 0)

    def cache_use(self, config: SchedulerConfig) -> CacheUse | None:
        """What it holds and what it has forgotten; None if it is not one to forget."""
        if self.prune is None:
            return None
        kept = float(self.table.kept[config.full_rows].mean())
        return CacheUse(kept, self.num_computed - kept)

    def check(self, config: SchedulerConfig) -> None:
        """AssertionError unless lengths, pages and windows agree."""
        kept, held, size = self.table.kept, self.table.held, config.page_size
        assert self.num_computed < len(self.tokens) or self.done
        assert self.table.num_pages == held.sum()
        free = held * size - kept - self.in_flight
        # What was repeated, or computed after the end, is not stored.
        spare = self.done or (self.prune is not None and self.prune.repeated + self.prune.repeating > 0)
        assert (free >= 0).all() and ((free < size + self.ahead).all() or spare), "a head has too few or too many pages"
        assert self.table.room in (0, int((held * size - kept).min())), "room is not what the pages leave"
        assert self.is_exact or not self.blocks, "a pruned sequence shares blocks"
        assert self.base is None or not self.is_exact
        assert self.base is not None or not self.table.borrowed.any()
        assert (kept <= self.num_computed).all() and (not self.num_computed or (kept[config.full_rows] > 0).all())
        assert not self.is_exact or (kept[config.full_rows] == self.num_computed).all()
        windows = config.row_windows
        if windows is None:
            return
        visible = np.minimum(windows - 1, self.num_computed)
        assert ((kept >= visible) | (windows == NO_WINDOW)).all(), "a visible entry was dropped"
        assert (held <= -(-(windows + config.max_batch_tokens) // size) + 1).all(), "unseen pages were not dropped"
