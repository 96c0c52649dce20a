"""What passes between who plans drafts and who chooses their lengths: who may draft, how much, and what came of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.plan import IntArray


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sequences of a step that may draft."""

    slots: IntArray
    """[S], distinct."""
    arrivals: npt.NDArray[np.int64]
    """[S]: whose slot it is, a number never used again."""
    known: IntArray
    """[S]: tokens."""
    left: IntArray
    """[S]: tokens that the sequence may still get."""
    limits: IntArray
    """[S]: most draft tokens, 0 to K."""
    decoding: int
    """Sequences of the step that get a token, with those that may not draft."""
    rows: int
    """Of the step, without drafts."""
    budget: int
    """Draft tokens that it can take."""
    foreseen: IntArray | None = None
    """[S]: tokens that n-grams would propose, 0: none; None: not known."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Draft tokens of sequences."""

    most: IntArray
    """[S]: that may be proposed."""
    model: IntArray
    """[S]: of them, those that a model may draw: none where n-grams are to propose."""

    @staticmethod
    def none(sequences: int) -> "Lengths":
        """Nobody drafts."""
        nothing = np.zeros(sequences, np.int32)
        return Lengths(nothing, nothing)

    def within(self, limits: IntArray, budget: int) -> "Lengths":
        """As far as `limits` [S] allow, and a budget in all, which those named first have first."""
        most = np.minimum(self.most, limits)
        if int(most.sum()) > budget:
            before = np.cumsum(most) - most
            most = np.clip(budget - before, 0, most).astype(np.int32)
        return Lengths(most, np.minimum(self.model, most))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the drafts of a step."""

    slots: IntArray
    """[S], distinct."""
    asked: IntArray
    """[S]: as planned, at least 1."""
    asked_model: IntArray
    """[S]: as planned, see `Lengths.model`."""
    drafted: IntArray
    """[S]: proposed and verified."""
    model_drafted: IntArray
    """[S]: of them, those that a model drew: all or none."""
    accepted: IntArray
    """[S]"""
    known: IntArray
    """[S]: tokens known now."""
    branched: IntArray | int = 0
    """[S]: those of `drafted` that tried no further place, as `SequenceOutput` has it."""
