"""How many of a draft's tokens the target will accept, found offline: no speculative decoding is run.

*Sampled*: a token drawn from q is accepted with probability sum min(p, q), exactly; it is measured on whole rows.
*Greedy*: the draft's chain from any point of the target's greedy text is accepted as long as each of its tokens is the
target's next one, and up to there the chain's context is that very text. So one pass of the draft over the text gives
all chains: no token needs to be generated. Letters: T tokens, k draft tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .target_rows import Logits

ROWS_AT_ONCE = 512
"""Positions whose whole distributions are held together."""


@dataclass(slots=True)
class Tally:
    """Counts over texts of one domain."""

    positions: int = 0
    overlap: float = 0.0
    """Sum over positions of the probability that a sampled draft token is accepted."""
    agreed: int = 0
    """Positions where both hold the same token most likely."""
    steps: int = 0
    """Of greedy speculative decoding."""
    tried: list[int] = field(default_factory=list)
    """Steps that came to draft token number i, all before it being accepted."""
    taken: list[int] = field(default_factory=list)
    """How many of those were accepted."""

    @property
    def acceptance(self) -> float:
        """1 - total variation distance."""
        return self.overlap / max(1, self.positions)

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.agreed / max(1, self.positions)

    @property
    def accepted_length(self) -> float:
        """Mean accepted draft tokens of a greedy step."""
        return sum(self.taken) / max(1, self.steps)

    @property
    def by_position(self) -> list[float]:
        """Acceptance of draft token number i, given that those before it were accepted."""
        return [taken / tried if tried else 0.0 for taken, tried in zip(self.taken, self.tried, strict=True)]

    def __iadd__(self, other: "Tally") -> "Tally":
        self.positions += other.positions
        self.overlap += other.overlap
        self.agreed += other.agreed
        self.steps += other.steps
        longest = max(len(self.tried), len(other.tried))
        for name in ("tried", "taken"):
            mine, theirs = getattr(self, name), getattr(other, name)
            padded = [values + [0] * (longest - len(values)) for values in (mine, theirs)]
            setattr(self, name, [a + b for a, b in zip(*padded, strict=True)])
        return self


@torch.inference_mode()
def sampled_tally(target: Logits, draft: Logits, ids: Sequence[int], temperature: float, device: torch.device) -> Tally:
    """Overlap and agreement at every position of a text."""
    tokens = torch.tensor([list(ids)], device=device)
    p_rows, q_rows = target(tokens)[0], draft(tokens)[0]
    tally = Tally(positions=len(ids))
    for first in range(0, len(ids), ROWS_AT_ONCE):
        p, q = (rows[first : first + ROWS_AT_ONCE].float() / temperature for rows in (p_rows, q_rows))
        tally.overlap += torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item()
        tally.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return tally


@torch.inference_mode()
def greedy_matches(draft: Logits, prompt: Sequence[int], output: Sequence[int], device: torch.device) -> np.ndarray:
    """Whether the draft's most likely token is the target's, bool [T], at each of the T tokens of a greedy output."""
    tokens = torch.tensor([[*prompt, *output]], device=device)
    best: Tensor = draft(tokens)[0, len(prompt) - 1 : -1].argmax(-1)
    matches: np.ndarray = best.cpu().numpy() == np.array(output)
    return matches


def chain_tally(matches: np.ndarray, most: int) -> Tally:
    """Greedy speculative decoding of an output with up to `most` drafts a step; `matches` [T] as `greedy_matches`.

    Each step accepts the run of matches at its place and takes one more token from the target. The step that passes
    the output's end is not counted: it would have gone on.
    """
    tally = Tally(tried=[0] * most, taken=[0] * most)
    place = 0
    while place + most < len(matches):
        run = 0
        while run < most and matches[place + run]:
            tally.tried[run] += 1
            tally.taken[run] += 1
            run += 1
        if run < most:
            tally.tried[run] += 1
        tally.steps += 1
        place += run + 1
    return tally
