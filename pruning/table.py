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
from .quest import QuestSelector
from .refine import REFINEMENTS
from .selector import Selector
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

SELECTORS: dict[str, Callable[[], Selector]] = {"quest": QuestSelector}
"""Those that forget nothing: each scores pages, of which a step reads the best."""

_SPECIAL = {"window": PolicyInfo(closes_up=True), "kvzip": PolicyInfo(repeats=True)}


def make_policy(params: PruneParams) -> Policy:
    """A fresh policy for one sequence, refined as asked.

    Raises `InvalidRequestError` for an unknown name, and `ValueError` for one that selects pages.
    """
    if params.policy not in (infos := policy_infos()):
        known = ", ".join(infos)
        raise InvalidRequestError(f"unknown pruning policy {params.policy!r}; known: {known}", param="prune.policy")
    if params.policy not in POLICIES:
        raise ValueError(f"{params.policy} selects pages and evicts nothing")
    policy = POLICIES[params.policy]()
    for name, refine in REFINEMENTS.items():
        policy = refine(policy) if name in params.refine else policy
    return policy


def make_selector(params: PruneParams) -> Selector | None:
    """A fresh selector for one sequence; None for a policy that evicts."""
    make = SELECTORS.get(params.policy)
    return None if make is None else make()


def policy_infos() -> dict[str, PolicyInfo]:
    """Every policy that can be asked for."""
    evicting = {name: _SPECIAL.get(name, PolicyInfo()) for name in POLICIES}
    return evicting | {name: PolicyInfo(selects=True) for name in SELECTORS}
