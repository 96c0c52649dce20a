"""What passes between scheduler and engine in one step: `BatchPlan` down, `StepOutput` up.

The batch is ragged: each sequence brings `n >= 1` tokens (a chunk of its known tokens, or its newest one). There
are no phases. Most sequences of most steps bring their newest token and want the next ones, nothing else: these travel
as columns (`Decodes`), so that a step costs no Python object per sequence. Letters: D sequences in the columns, S
others, L layers, K kv heads, B entries of a page.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .ids import SlotId
from .pruning import PruneParams
from .request import Grammar, SamplingParams
from .speculation import CaughtUp

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SlotAssignment:
    """A sequence enters (or, after preemption, re-enters) the engine's slot; the slot's old state is forgotten."""

    slot: SlotId
    params: SamplingParams
    seed: int
    """Key of the counter-based generator, unique to the choice; 64 bits unsigned."""
    stop_ids: tuple[int, ...]
    """Tokens that end the sequence: masked out until `params.min_tokens` tokens are generated."""
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    """Tokens generated before a preemption (they count for penalties), else empty."""
    max_length: int
    """Most positions that its queries and keys are rotated to: fixes length-dependent RoPE scaling."""
    cached: int = 0
    """Tokens computed from the start. Their entries are in the pages of `BatchPlan.shares`: all of them in every head,
    a multiple of B, unless `kept` says otherwise."""
    kept: IntArray | None = None
    """Entries that each head has of them where they were pruned, int32 [R]."""
    prune: PruneParams | None = None
    """How the sequence forgets: what must be observed of it; None: nothing."""
    restored: "Restored | None" = None
    """The sequence comes back as it was when it was swapped out; `cached` says nothing then."""
    record: bool = False
    """Whether the most likely tokens of each row that it samples from are wanted, see `core.top_rows`."""
    grammar: Grammar | None = None
    """What its output is bound to. Its tokens must be known before it decodes on."""
    namespace: tuple[object, ...] = ()
    """What anybody computed of its tokens serves sequences of an equal namespace alone: it makes those faster, which
    tells what was asked before."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a swapped-out sequence finds again; its pages, the partly filled ones too, are in `BatchPlan.shares`."""

    ticket: int
    """Of the `Park` under which the engine put away the slot's other state."""
    kept: IntArray
    """Entries of each head, int32 [R]."""
    computed: int
    """Tokens computed, the position of the next one."""


@dataclass(frozen=True, slots=True)
class Park:
    """The sequence of a slot leaves, to come back: what the engine holds for it beside pages is put away."""

    slot: SlotId
    ticket: int
    """Unique while the engine runs."""


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Whole pages that travel between the device's pool and the host's, as parallel arrays."""

    device: IntArray
    """Page ids of the KV pool."""
    host: IntArray
    """Page ids of the host pool."""

    @staticmethod
    @functools.cache
    def none() -> "PageCopies":
        """Nothing travels."""
        empty = np.empty(0, np.int32)
        return PageCopies(empty, empty)


@dataclass(frozen=True, slots=True)
class PageDuplicates:
    """Whole pages of the device's pool to be copied within it, as parallel arrays; no page is in both."""

    sources: IntArray
    targets: IntArray

    @staticmethod
    @functools.cache
    def none() -> "PageDuplicates":
        """Nothing is copied."""
        empty = np.empty(0, np.int32)
        return PageDuplicates(empty, empty)


@dataclass(frozen=True, slots=True)
class PageGrants:
    """Page-table diff of one step, as parallel arrays: `table[slots, rows // K, rows % K, columns] = pages`."""

    slots: IntArray
    rows: IntArray
    """layer * K + kv head."""
    columns: IntArray
    """Which page of that head, counted from its first kept one."""
    pages: IntArray

    @staticmethod
    @functools.cache
    def none() -> "PageGrants":
        """No page changes hands."""
        empty = np.empty(0, np.int32)
        return PageGrants(empty, empty, empty, empty)


@dataclass(frozen=True, slots=True)
class PageDrop:
    """The leading `pages` of the heads `rows` of a slot left the table (a sliding window went past them).

    The engine shifts those table rows left by `pages` and lowers their kept lengths by `pages * B`. Applied before
    the step's grants.
    """

    slot: SlotId
    rows: IntArray
    pages: int


@dataclass(frozen=True, slots=True)
class PruneOrder:
    """After the forward pass, choose what a slot keeps; nothing moves until a `Compaction` says so.

    The choice is forgotten unless the very next plan compacts the slot. The slot need not be in the batch.
    """

    slot: SlotId
    target: int
    """Entries per head, on average over the layers without a window, that stay."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """Gather what the last step's `PruneOrder` chose to keep; the slot has computed nothing since."""

    slot: SlotId
    counts: IntArray
    """Entries that each head keeps, int32 [R], R = L * K; as the engine said."""
    pages: IntArray | None
    """Fresh pages for them, int32, ceil(count / B) per head, head after head; the old ones are left as they are. None:
    every head keeps its own leading pages, of which nobody else reads."""


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence's part of the batch."""

    slot: SlotId
    start: int
    """Logical position of the first new token (= tokens already computed)."""
    token_ids: tuple[int, ...]
    """The n >= 1 tokens to compute at positions start, start + 1, ..."""
    sample: bool
    """Whether these are all known tokens, so that the last row's logits give the next one."""
    score_ids: tuple[int, ...] = ()
    """Prompt log-probabilities wanted: row t scores `score_ids[t]`, the token that follows it; at most n."""
    scratch: bool = False
    """Only to be observed: the entries are not kept, and the next step's come to lie where they were."""
    drafts: int = 0
    """Most tokens that the engine's drafter may propose to follow `token_ids`, which are then all known ones but for
    these: `sample` is set, and there are pages for so many entries more. What is proposed is verified in this very
    step; only the entries of `token_ids` and of accepted proposals are kept."""
    model_drafts: int | None = None
    """Of them, those that a model may draw, where n-grams draft too; None: all."""
    parents: tuple[int, ...] = ()
    """Of the engine's own making: the proposals are a tree, each follows the one with this index, -1: the last known
    token (see `speculation.drafter.Proposals`). Empty: each follows the one before it."""


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences that compute their newest token and sample what follows, and want no log-probabilities: one row each.

    A row means the same as `SequencePlan(slot, start, (token,), True, drafts=drafts, model_drafts=model_drafts)`.
    """

    slots: IntArray
    """[D], distinct."""
    starts: IntArray
    """[D]: logical position of the token."""
    token_ids: IntArray
    """[D]; `NO_TOKEN`: the one that the slot's sequence sampled last, which only the engine may know yet."""
    drafts: IntArray | None = None
    """[D], some of them more than 0, as the next: see `SequencePlan`; all tokens are known. None: nobody drafts."""
    model_drafts: IntArray | None = None

    def __len__(self) -> int:
        return len(self.slots)

    @staticmethod
    @functools.cache
    def none() -> "Decodes":
        """No rows."""
        empty = np.empty(0, np.int32)
        return Decodes(empty, empty, empty)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step's work, in this order: parks, swap-outs, compactions, swap-ins, duplicates, assignments, shares, drops,
    grants, the forward pass, prunes.

    A page that is copied out may be the target of a compaction or filled anew in the same plan; one that a compaction
    leaves may be filled by a swap-in or granted.
    """

    sequences: tuple[SequencePlan, ...]
    """Possibly none, if there are prunes or compactions."""
    assignments: tuple[SlotAssignment, ...] = ()
    drops: tuple[PageDrop, ...] = ()
    grants: PageGrants = field(default_factory=PageGrants.none)
    """Fresh pages, whose old contents are to be cleared."""
    shares: PageGrants = field(default_factory=PageGrants.none)
    """Pages that assigned slots begin with: full ones computed by others, read by several slots and written by none,
    duplicates of such as are not full, and what a restored sequence had for itself."""
    decodes: Decodes = field(default_factory=Decodes.none)
    """More sequences of the batch; none is in `sequences` too. Their rows come first in the forward pass."""
    parks: tuple[Park, ...] = ()
    unparked: tuple[int, ...] = ()
    """Tickets whose sequences do not come back."""
    swap_outs: PageCopies = field(default_factory=PageCopies.none)
    """From the device to the host."""
    swap_ins: PageCopies = field(default_factory=PageCopies.none)
    """From the host to the device."""
    duplicates: PageDuplicates = field(default_factory=PageDuplicates.none)
    """Pages that a pruned prefix and its users would both fill up: each gets its own."""
    compactions: tuple[Compaction, ...] = ()
    prunes: tuple[PruneOrder, ...] = ()
    foresee: bool = False
    """Whether `StepOutput.foreseen` is wanted."""

    def parts(self) -> Iterator[SequencePlan]:
        """All sequences of the batch in the order of their rows, decodes too."""
        yield from self.decode_parts(np.arange(len(self.decodes)))
        yield from self.sequences

    def decode_parts(self, rows: npt.NDArray[np.intp]) -> Iterator[SequencePlan]:
        """What these rows of the decodes mean."""
        decodes = self.decodes
        drafts = np.zeros(len(decodes), np.int32) if decodes.drafts is None else decodes.drafts
        by_model = drafts if decodes.model_drafts is None else decodes.model_drafts
        columns = (decodes.slots, decodes.starts, decodes.token_ids, drafts, by_model)
        for slot, start, token, most, most_model in zip(*(column[rows].tolist() for column in columns), strict=True):
            yield SequencePlan(SlotId(slot), start, (token,), True, drafts=most, model_drafts=most_model)

    @property
    def asks_drafts(self) -> bool:
        """Whether anybody drafts."""
        return self.decodes.drafts is not None or any(part.drafts for part in self.sequences)

    @property
    def changes_hands(self) -> bool:
        """Whether anything is to be done before the forward pass."""
        lists = self.parks or self.unparked or self.compactions or self.assignments or self.drops
        copies = len(self.swap_outs.host) or len(self.swap_ins.host) or len(self.duplicates.targets)
        return bool(lists or copies or len(self.shares.pages) or len(self.grants.pages))

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass, without those of drafts."""
        return len(self.decodes) + sum(len(s.token_ids) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one position, of the model's own distribution (before temperature and penalties)."""

    token_id: int
    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with theirs, best first, as many as asked for."""


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step gave one sequence; aligned with `BatchPlan.sequences`."""

    token_ids: tuple[int, ...] = ()
    """Newly accepted tokens: none unless `sample`, else those of the draft that were right, and one more, unless its
    grammar ends before."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per accepted token if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One per `score_ids`."""
    drafted: int = 0
    """Tokens that were proposed and verified, at most `SequencePlan.drafts`."""
    model_drafted: int = 0
    """Of them, those that were drawn from a model's distributions: all or none."""
    branched: int = 0
    """Of them, those of a tree that are not on its longest path: rows that could not make the step's text longer."""
    error: str | None = None
    """Why this one sequence cannot go on (non-finite logits, a grammar that got too complex); the others are
    unaffected."""
    recorded: tuple[bytes, ...] = ()
    """One row of `core.top_rows` per accepted token, if asked for."""
    forced: tuple[int, ...] = ()
    """Tokens that follow those, up to `MAX_FORCED_TOKENS`: its grammar allows no others. They are not computed yet."""
    ended: bool = False
    """Whether its grammar allows nothing after all these."""

    @staticmethod
    def of(token: int) -> "SequenceOutput":
        """What a row got that gave `StepOutput.decoded` the token."""
        return SequenceOutput(error=NON_FINITE) if token == NO_TOKEN else SequenceOutput((token,))


MAX_FORCED_TOKENS = 32
"""Of a sequence in one step."""
NON_FINITE = "the model produced non-finite values"
"""Why a sequence cannot go on: its logits have no meaning."""
NO_TOKEN = -1
"""In `StepOutput.decoded`: the row failed (`NON_FINITE`). In `Decodes.token_ids`: the token is not known yet."""


@dataclass(frozen=True, slots=True)
class Runs:
    """What the rows of a step's decodes got where some of them drafted: up to W tokens each."""

    token_ids: IntArray
    """[D, W], padded with `NO_TOKEN`: see `SequenceOutput`."""
    counts: IntArray
    """[D]; 0: the row failed."""
    drafted: IntArray
    """[D], as the next two: see `SequenceOutput`."""
    model_drafted: IntArray
    branched: IntArray


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of one step."""

    sequences: tuple[SequenceOutput, ...]
    forward_seconds: float = 0.0
    """Time in the model's forward pass."""
    sample_seconds: float = 0.0
    """Time in logits processing and sampling."""
    decoded: IntArray = field(default_factory=lambda: np.empty(0, np.int32))
    """[D]: the token that each row of `BatchPlan.decodes` sampled, the last one of several, or `NO_TOKEN`."""
    kept: tuple[IntArray, ...] = ()
    """Per `BatchPlan.prunes`, how many entries each head would keep, int32 [R]."""
    prune_seconds: tuple[float, ...] = ()
    """Per `BatchPlan.prunes`, time to choose."""
    copied_pages: int = 0
    """Pages whose copying between device and host has been timed since the last step."""
    copy_seconds: float = 0.0
    """How long those took."""
    draft_seconds: float = 0.0
    """Time in proposing."""
    grammar_seconds: float = 0.0
    """Time in computing what grammars allow, a part of the others, since the last step was finished."""
    recorded: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)
    """Of the rows of `BatchPlan.decodes` whose sequences ask for it: see `SequenceOutput`."""
    apart: Mapping[int, SequenceOutput] = field(default_factory=dict)
    """Of the rows of `BatchPlan.decodes` whose grammars end, fail, or force more tokens: what they got."""
    foreseen: IntArray | None = None
    """[D + S], if asked for: of the rows of `BatchPlan.decodes` and of its sequences, how many tokens the drafter would
    propose after the newest one without a model's pass, 0 to `MAX_DRAFT_TOKENS`; that many if it cannot tell."""
    foresight_seconds: float = 0.0
    """Time that this took."""
    caught_up: CaughtUp = field(default_factory=CaughtUp)
    recalled: tuple[int, ...] = ()
    """Per `BatchPlan.assignments`, how many leading tokens a draft model's cache has of it: it need not compute these
    when it is first asked. Empty where none has a cache."""
    runs: Runs | None = None
    """Of the rows of `BatchPlan.decodes`, if something was proposed for any of them; else each got one token."""

    def of_decode(self, row: int) -> SequenceOutput:
        """What a row of `BatchPlan.decodes` got."""
        if row in self.apart:
            return self.apart[row]
        runs = self.runs
        if runs is None or not runs.counts[row]:
            return SequenceOutput.of(int(self.decoded[row]))
        ids = tuple(runs.token_ids[row, : runs.counts[row]].tolist())
        drafted, drew, branched = (int(column[row]) for column in (runs.drafted, runs.model_drafted, runs.branched))
        return SequenceOutput(ids, drafted=drafted, model_drafted=drew, branched=branched)
