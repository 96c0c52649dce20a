"""`pruned_key`: the name of what is left of a context once it is pruned, and whether others may begin with that."""

import struct
from hashlib import sha256

from ..core.pruning import PruneParams
from ..core.request import Request
from .config import SchedulerConfig


def pruned_key(namespace: tuple[object, ...], request: Request, config: SchedulerConfig) -> bytes | None:
    """Name of what will be left of the request's context; None if that is not for others.

    It is not if the context is the whole prompt, whose last token must be computed, or if a later prune would need what
    the policy has seen of the context: that stays with the slot.
    """
    prune = request.prune
    if prune is None or not 0 < prune.context < len(request.prompt_ids):
        return None
    info = config.policies[prune.policy]
    prunes_again = not info.repeats and (prune.every > 0 or config.prunes_under_pressure)
    if not prune.forgets or info.selects or prune.when != "always" or (prunes_again and info.observes):
        return None
    hasher = sha256(repr((namespace, _shape(prune), request.repeat_ids if info.repeats else ())).encode())
    hasher.update(struct.pack(f"{prune.context}i", *request.prompt_ids[: prune.context]))
    return hasher.digest()


def _shape(prune: PruneParams) -> tuple[object, ...]:
    """All that decides what is left of a context: not when the sequence is pruned after that."""
    return tuple(getattr(prune, name) for name in prune.__struct_fields__ if name not in ("every", "when"))
