"""Grammars: which tokens may come next, for the sequences whose output is bound to one.

llguidance reads a grammar, and follows it token by token: its matcher has consumed exactly the output of its sequence,
but for an end token. It walks along draft tokens and back again; all else only moves it forward. Letters: N rows of
logits, M of them masked, V vocabulary.
"""

import re
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from ..core.errors import InvalidRequestError
from ..core.messages import GrammarCounts
from ..core.model_spec import ModelSpec
from ..core.plan import MAX_FORCED_TOKENS, IntArray, SlotAssignment
from ..core.request import MAX_GRAMMAR_FUEL, MAX_GRAMMAR_SYMBOLS, Grammar
from ..kernels.sampling import RowMasks

Bits = npt.NDArray[np.uint8]

_Walk = tuple[LLMatcher, int, list[int]]
"""A matcher, its first row, and the draft tokens that its other rows follow."""
_Part = tuple[int, int, Sequence[int]]
"""Of a sequence: slot, first row, draft tokens."""
_MUCH = 2**19
"""Bits of masks that are worth waking other threads, which takes 0.1 ms."""
_MOST_COMPILED = 64
"""Grammars kept; each with what was ever found out of it, some megabytes for the worst."""
_LIMITS = LLParserLimits(
    max_grammar_size=MAX_GRAMMAR_SYMBOLS,
    initial_lexer_fuel=MAX_GRAMMAR_FUEL,
    step_lexer_fuel=50_000,
    max_lexer_states=50_000,
    max_items_in_row=10_000,
    verbose_errors=False,
)
"""A step of the worst grammar takes 35 ms then for its lexer, 0.3 s for its parser, and fails; no usual one comes
near."""
_MOST_FORCED = 2**15
"""Bytes without an alternative: they are looked through in each step until they are generated."""


@dataclass(slots=True)
class _Bound:
    """A slot's sequence."""

    matcher: LLMatcher | None
    """None: its grammar could not be compiled."""
    ends: tuple[int, ...]
    """The model's end tokens."""
    early: tuple[int, ...]
    """End tokens that do not come before position `min_end`, unless the grammar allows nothing else."""
    min_end: int
    late: tuple[int, ...]
    """The same from there on."""
    runs_on: bool
    """Whether it may get tokens that are not drawn: what the model says of them nobody asks."""
    error: str = ""
    """Why it cannot go on."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a sequence got of the tokens that were accepted."""

    token_ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    """Tokens that follow them: nothing else is allowed."""
    ended: bool = False
    """Whether the grammar allows nothing after all these."""
    error: str = ""


def load_tokenizer(folder: Path, spec: ModelSpec) -> LLTokenizer:
    """Of a checkpoint, for a model whose logits are over `spec.vocab_size` tokens.

    Raises `InvalidRequestError` where there is none that grammars can be followed in. Takes a second for 150,000
    tokens, and lets no other thread run meanwhile.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InvalidRequestError("structured outputs need a tokenizer.json, which this model does not have")
    text = file.read_text()
    ends = [token for token in spec.eos_token_ids if token < spec.vocab_size] or None
    try:
        tokenizer = LLTokenizer(text, eos_token=ends)
        # A vocabulary may be padded, or lack tokens that the tokenizer has; it cannot be made smaller than that.
        return tokenizer if tokenizer.vocab_size >= spec.vocab_size else LLTokenizer(text, spec.vocab_size, ends)
    except ValueError as error:
        raise InvalidRequestError(f"structured outputs cannot use this model's tokenizer: {_line(error)}") from error


class Grammars:
    """Compiled grammars by what they say, and where in theirs the slots' sequences are."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokenizer: LLTokenizer | None = None
        self.obstacle = "structured outputs are not available here: no tokenizer was loaded"
        """Why no sequence can be bound, while there is no tokenizer."""
        self._executor: LLExecutor | None = None
        self._compiled: OrderedDict[str, LLMatcher | str] = OrderedDict()
        """By source: the matcher before any token, or why there is none. The last one used comes last."""
        self._wanted: Counter[str] = Counter()
        """By source: how many `Grammar` objects, which live as long as their requests, were compiled. What those need
        is the last to be dropped: a step would have to wait until it is compiled again."""
        self._lock = threading.RLock()
        self._count = self._forced_tokens = 0
        self._compile_seconds = 0.0
        self._bound: dict[int, _Bound] = {}
        self._seconds = 0.0

    def __bool__(self) -> bool:
        """Whether any slot's sequence may be bound."""
        return bool(self._bound)

    def binds(self, slot: int) -> bool:
        """Whether the slot's sequence is."""
        return slot in self._bound

    def read(self, folder: Path, spec: ModelSpec) -> None:
        """Follow grammars in the tokens of a checkpoint's tokenizer, if it has one; before any sequence is bound."""
        try:
            self.tokenizer = load_tokenizer(folder, spec)
        except InvalidRequestError as error:
            self.obstacle = error.message

    def knows(self, grammar: Grammar) -> bool:
        """Whether `compile` would not take long."""
        return self.tokenizer is None or grammar.source in self._compiled

    def compile(self, grammar: Grammar) -> LLMatcher:
        """The matcher before any token, to be copied; on any thread. Raises `InvalidRequestError`.

        Pathological ones take half a second: then too what is to be known for the first tokens is found out here.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(self.obstacle)
        with self._lock:
            compiled = self._compiled.get(grammar.source)
            if compiled is not None:
                self._compiled.move_to_end(grammar.source)
        if compiled is None:
            started = time.thread_time()
            compiled = _compiled(self.tokenizer, grammar)
            with self._lock:
                self._compiled[grammar.source] = compiled
                self._count += 1
                self._compile_seconds += time.thread_time() - started
        with self._lock:
            self._keep(grammar)
        if isinstance(compiled, str):
            raise InvalidRequestError(compiled)
        return compiled

    def _keep(self, grammar: Grammar) -> None:
        """While the object lives, rather than others, and rather than older ones. Under the lock."""
        self._wanted[grammar.source] += 1
        weakref.finalize(grammar, self._forgo, grammar.source).atexit = False
        if len(self._compiled) > _MOST_COMPILED:
            del self._compiled[min(self._compiled, key=self._wanted.__contains__)]

    def _forgo(self, source: str) -> None:
        with self._lock:
            self._wanted[source] -= 1
            if not self._wanted[source]:
                del self._wanted[source]

    def counts(self) -> GrammarCounts:
        """Since the beginning."""
        return GrammarCounts(
            compiled=self._count, compile_seconds=self._compile_seconds, forced_tokens=self._forced_tokens
        )

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot; it may have begun its output."""
        self._bound.pop(assignment.slot, None)
        if assignment.grammar is None:
            return
        ends = tuple(self.tokenizer.eos_tokens) if self.tokenizer is not None else ()
        bound = _Bound(
            matcher=None,
            ends=ends,
            early=tuple({*assignment.stop_ids, *ends}),
            min_end=len(assignment.prompt_ids) + assignment.params.min_tokens,
            late=ends if assignment.params.ignore_eos else (),
            # A prune goes by the length at which it is looked at, so that must not leap.
            runs_on=assignment.params.logprobs is None and not assignment.record and assignment.prune is None,
        )
        self._bound[assignment.slot] = bound
        try:
            bound.matcher = self.compile(assignment.grammar).deep_copy()
        except InvalidRequestError as error:
            bound.error = error.message
            return
        if not bound.matcher.consume_tokens(list(assignment.output_ids)):
            bound.error = _failure(bound.matcher)

    def bound(self, slots: IntArray) -> Iterator[_Part]:
        """Of a row for each of the slots, those whose sequences are bound."""
        return ((slot, row, ()) for row, slot in enumerate(slots.tolist()) if slot in self._bound)

    def masks(self, parts: Iterable[_Part], positions: IntArray) -> RowMasks | None:
        """For sequences' rows; None if none of them is bound.

        A row follows the draft tokens before it. One after a token that is not allowed, or ends the output, allows all.
        positions [N]: of the tokens that the rows give.
        """
        walks: list[_Walk] = []
        rows: list[int] = []
        owners: list[_Bound] = []
        for slot, first, drafts in parts:
            bound = self._bound.get(slot)
            if bound is None or bound.matcher is None or bound.error:
                continue
            walks.append((bound.matcher, len(rows), list(drafts)))
            rows.extend(range(first, first + 1 + len(drafts)))
            owners.extend([bound] * (1 + len(drafts)))
        if not walks:
            return None
        bits = self.fill(walks, len(rows))
        for row, bound in enumerate(owners):
            assert bound.matcher is not None
            if bound.matcher.is_error():
                bound.error = bound.error or _failure(bound.matcher)
                bits[row] = 255
            elif ends := bound.early if positions[rows[row]] < bound.min_end else bound.late:
                _hold_back(bits[row], ends)
        bits[~bits.any(1)] = 255  # the model has no such token: whatever is drawn then, `take` will say so
        return RowMasks(np.array(rows, np.int64), bits)

    def fill(self, walks: Sequence[_Walk], count: int) -> Bits:
        """Masks of `count` rows, as `RowMasks` has them; rows of no walk allow all."""
        assert self.tokenizer is not None
        started = time.perf_counter()
        words = np.full((count, -(-self.tokenizer.vocab_size // 32)), -1, np.int32)
        if count * self.tokenizer.vocab_size < _MUCH:
            first, size = words.ctypes.data, words.strides[0]
            for matcher, row, drafts in walks:
                # The library's stubs lack it.
                matcher.unsafe_compute_mask_ptr_with_draft_token(first + row * size, size, drafts)  # type: ignore[attr-defined]
        else:
            self._executor = self._executor or LLExecutor()
            # Each call of the library refuses what the other is for, and an empty list.
            if drafting := [walk for walk in walks if walk[2]]:
                fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafting, words)
            if plain := [(matcher, row) for matcher, row, drafts in walks if not drafts]:
                fill_next_token_bitmask_par(self._executor, plain, words)
        bits = words.view(np.uint8)
        whole, rest = divmod(self.vocab_size, 8)
        bits[:, whole + (rest > 0) :] = 0
        if rest:
            bits[:, whole] &= (1 << rest) - 1
        self._seconds += time.perf_counter() - started
        return bits

    def allowed(self, slot: int, token_ids: Sequence[int]) -> int:
        """How many of the tokens that are to follow its output the grammar of a slot that has one allows."""
        matcher = self._bound[slot].matcher
        return 0 if matcher is None else matcher.validate_tokens(list(token_ids))

    def take(self, slot: int, token_ids: Sequence[int]) -> Step:
        """The tokens follow the output of a slot that is bound, up to where its grammar ends."""
        bound = self._bound[slot]
        if bound.matcher is None or bound.error:
            return Step((), error=bound.error)
        for count, token in enumerate(token_ids, 1):
            if token in bound.ends and bound.matcher.is_accepting():
                return Step(tuple(token_ids[:count]), ended=True)
            # Also where the model has no token that is allowed: then any is drawn.
            if not bound.matcher.consume_token(token):
                bound.error = _failure(bound.matcher)
                return Step((), error=bound.error)
            if bound.matcher.is_stopped():
                return Step(tuple(token_ids[:count]), ended=True)
        return Step(tuple(token_ids), *self._forced(bound, bound.matcher) if bound.runs_on else ())

    def _forced(self, bound: _Bound, matcher: LLMatcher) -> tuple[tuple[int, ...], bool]:
        """Tokens without an alternative that come next, which the matcher consumes; whether nothing may follow them."""
        forced = list[int]()
        for token in matcher.compute_ff_tokens()[:MAX_FORCED_TOKENS]:
            if token >= self.vocab_size or token in bound.ends or not matcher.consume_token(token):
                break
            forced.append(token)
            if matcher.is_stopped():
                break
        self._forced_tokens += len(forced)
        return tuple(forced), matcher.is_stopped() and bool(forced)

    def walk(self, slots: IntArray) -> "DraftWalk":
        """From where the sequences of slots [S] are."""
        bound = ((place, self._bound.get(slot)) for place, slot in enumerate(slots.tolist()))
        copies = {place: one.matcher.deep_copy() for place, one in bound if one and one.matcher and not one.error}
        return DraftWalk(self, copies)

    def spent(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def clear(self) -> None:
        """Forget all slots."""
        self._bound.clear()


class DraftWalk:
    """Where draft tokens lead that are drawn one after another: a token that is not allowed is never proposed.

    It is a help and no rule: verification rejects such a token anyway.
    """

    def __init__(self, grammars: Grammars, matchers: dict[int, LLMatcher]) -> None:
        """matchers: by place among the sequences that draft, before their first draft token."""
        self._grammars = grammars
        self._matchers = matchers

    def masks(self, members: IntArray) -> RowMasks | None:
        """For a row of each of the sequences `members` [N]."""
        walks = [(row, self._matchers[place]) for row, place in enumerate(members.tolist()) if place in self._matchers]
        if not walks:
            return None
        bits = self._grammars.fill([(matcher, index, []) for index, (_, matcher) in enumerate(walks)], len(walks))
        bits[~bits.any(1)] = 255  # nothing is allowed: verification will say so
        return RowMasks(np.array([row for row, _ in walks], np.int64), bits)

    def take(self, members: IntArray, token_ids: Sequence[int]) -> None:
        """The sequences `members` [N] got these draft tokens [N]."""
        for place, token in zip(members.tolist(), token_ids, strict=True):
            matcher = self._matchers.get(place)
            if matcher is not None and (not matcher.consume_token(token) or matcher.is_stopped()):
                del self._matchers[place]


def _hold_back(bits: Bits, ends: Sequence[int]) -> None:
    """Forbid these tokens in a row [V / 8], if then anything is left to come."""
    kept = bits.copy()
    for token in ends:
        bits[token >> 3] &= ~(1 << (token & 7)) & 255
    if not bits.any():
        bits[:] = kept


def _compiled(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher | str:
    """The matcher before any token, which knows what may be the first; or why there is none."""
    matcher = LLMatcher(tokenizer, grammar.source, limits=_LIMITS, log_level=0)
    fault = _line(matcher.get_error()) if matcher.is_error() else _first_fault(matcher)
    return f"the {grammar.kind} cannot be followed: {fault}" if fault else matcher


def _first_fault(matcher: LLMatcher) -> str:
    """What is wrong at the first token or behind it, as far as one that may be the first shows."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    ahead = matcher.deep_copy()
    for token in np.flatnonzero(np.unpackbits(bits, bitorder="little"))[:1].tolist():
        if ahead.consume_token(token):
            ahead.compute_bitmask()
    for one in (matcher, ahead):
        if one.is_error():
            return _line(one.get_error())
        if len(one.compute_ff_bytes()) > _MOST_FORCED:
            return f"it leaves no choice for more than {_MOST_FORCED:,} bytes"
    return ""


def _failure(matcher: LLMatcher) -> str:
    return f"the output cannot go on in its grammar: {_line(matcher.get_error())}"


def _line(error: object) -> str:
    """On one line, without what the library says of its own state."""
    return " ".join(re.split("<state>|<non-verbose/>", str(error))[0].split())[:300] or "no reason is given"
