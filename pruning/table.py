"""The policies by name."""

from collections.abc import Callable

from ..core.errors import InvalidRequestError
from ..core.pruning import PolicyInfo, PruneParams
from .knorm import KNormPolicy
from .policy import Policy
from .window import WindowPolicy

POLICIES: dict[str, Callable[[], Policy]] = {
    "window": WindowPolicy,
    "knorm": KNormPolicy,
}
"""Those that evict."""

_INFOS: dict[str, PolicyInfo] = {}
"""What is special about a policy."""


def make_policy(params: PruneParams) -> Policy:
    """A fresh policy for one sequence, refined as asked; raises `InvalidRequestError` for an unknown name."""
    if params.policy not in POLICIES:
        known = ", ".join(policy_infos())
        raise InvalidRequestError(f"unknown pruning policy {params.policy!r}; known: {known}", param="prune.policy")
    return POLICIES[params.policy]()


def policy_infos() -> dict[str, PolicyInfo]:
    """Every policy that can be asked for."""
    return {name: _INFOS.get(name, PolicyInfo()) for name in POLICIES}
