"""The policies by name."""

from collections.abc import Callable

from ..core.errors import InvalidRequestError
from ..core.pruning import PolicyInfo, PruneParams
from .expected import ExpectedAttentionPolicy
from .h2o import H2OPolicy
from .keydiff import KeyDiffPolicy
from .knorm import KNormPolicy
from .kvzip import KVzipPolicy
from .lagkv import LagKVPolicy
from .policy import Policy
from .refine import REFINEMENTS
from .snapkv import SnapKVPolicy
from .tova import TovaPolicy
from .window import WindowPolicy

POLICIES: dict[str, Callable[[], Policy]] = {
    "window": WindowPolicy,
    "knorm": KNormPolicy,
    "keydiff": KeyDiffPolicy,
    "lagkv": LagKVPolicy,
    "tova": TovaPolicy,
    "snapkv": SnapKVPolicy,
    "h2o": H2OPolicy,
    "expected": ExpectedAttentionPolicy,
    "kvzip": KVzipPolicy,
}
"""Those that evict: each scores entries."""

_INFOS = {name: PolicyInfo() for name in POLICIES} | {
    "window": PolicyInfo(closes_up=True),
    "kvzip": PolicyInfo(repeats=True),
    "quest": PolicyInfo(selects=True),
}
"""All of them: `quest` selects pages (`pruning.quest`) and scores nothing."""


def make_policy(params: PruneParams) -> Policy:
    """A fresh policy for one sequence, refined as asked.

    Raises `InvalidRequestError` for an unknown name, and `ValueError` for one that selects pages.
    """
    if params.policy not in _INFOS:
        known = ", ".join(_INFOS)
        raise InvalidRequestError(f"unknown pruning policy {params.policy!r}; known: {known}", param="prune.policy")
    if params.policy not in POLICIES:
        raise ValueError(f"{params.policy} selects pages and evicts nothing")
    policy = POLICIES[params.policy]()
    for name, refine in REFINEMENTS.items():
        policy = refine(policy) if name in params.refine else policy
    return policy


def policy_infos() -> dict[str, PolicyInfo]:
    """Every policy that can be asked for."""
    return dict(_INFOS)
