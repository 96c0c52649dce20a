"""What a draft is trained to make small: divergences of its distribution q from the target's p.

Both are given over K + 1 events: the K tokens that the target holds most likely, one by one, and all other tokens
lumped together. On these events every formula is exact. Lumping never makes a divergence larger, so what is measured
over lumped rows is a bound; `acceptance` over whole rows is exact. Sources: DistillSpec (Zhou et al. 2023, section 4)
for kl, rkl, jsd and tvd; sum min(p, q) = 1 - tvd is the acceptance rate (Leviathan et al. 2022).
Letters: N rows, V vocabulary, K tokens kept of each row.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.top_rows import LEAST_MASS
from .picked import picked_log_probs

Divergence = Literal["kl", "rkl", "jsd", "tvd", "logacc"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

ABSENT = -1e4
"""Log-probability on both sides of an event that is none, where a row has fewer than K: it adds to no divergence."""


def lump(logits: Tensor, ids: Tensor, absent: Tensor | None = None) -> Tensor:
    """Log-probabilities [N, K + 1] float32 of the tokens ids [N, K] and, last, of all others; logits [N, V].

    Where absent [N, K] bool, there is no token, and what stands in its place is `ABSENT`.
    """
    kept = picked_log_probs(logits, ids)
    if absent is not None:
        kept = kept.masked_fill(absent, ABSENT)
    rest = (1.0 - kept.exp().sum(1, keepdim=True)).clamp_min(LEAST_MASS).log()
    return torch.cat([kept, rest], 1)


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Forward KL(p || q) [N]: covers all that the target may say."""
    return (p_log.exp() * (p_log - q_log)).sum(1)


def rkl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Reverse KL(q || p) [N]: seeks the target's modes."""
    return kl(q_log, p_log)


def jsd(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Jensen-Shannon divergence [N], half of each side's KL to their mean."""
    mean = torch.logaddexp(p_log, q_log) - torch.log(torch.tensor(2.0))
    return 0.5 * (kl(p_log, mean) + kl(q_log, mean))


def acceptance(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Probability [N] that a token drawn from q is accepted for p: sum min(p, q)."""
    return torch.minimum(p_log, q_log).exp().sum(1)


def tvd(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Total variation distance [N], 1 - acceptance: the objective itself, of small gradient far from the optimum."""
    return 0.5 * (p_log.exp() - q_log.exp()).abs().sum(1)


def logacc(p_log: Tensor, q_log: Tensor) -> Tensor:
    """-log acceptance [N]: as tvd, but it also trains from a cold start."""
    return -torch.logsumexp(torch.minimum(p_log, q_log), 1)


FORMULAS: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "rkl": rkl,
    "jsd": jsd,
    "tvd": tvd,
    "logacc": logacc,
}
"""Each takes log-probabilities p, q [N, events] and gives a loss [N]; no event may have probability 0."""
