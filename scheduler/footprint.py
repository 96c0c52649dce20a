"""How much a sequence holds that prunes its prompt while that is computed, and how long it may get for that."""

from ..core.pruning import PruneParams
from ..core.request import Request
from .config import SchedulerConfig


def stays_bounded(prune: PruneParams, config: SchedulerConfig) -> bool:
    """Whether pruning holds what a sequence stores within `most_entries`, from its first chunk on."""
    steady = prune.chunked and prune.when == "always" and prune.budget != "threshold"
    return prune.forgets and steady and config.policies[prune.policy].relieves


def most_entries(prune: PruneParams, config: SchedulerConfig, length: int, context: int) -> int:
    """Most entries per head, on average, until `length` tokens are computed, the leading `context` as a prompt.

    Where pages are short, what it takes: chunks are cut down to `least_chunk` (`Growth.affordable`).
    """
    behind = length - context
    since = min(behind, prune.every) if prune.every else behind
    # Heads of unequal length begin a page more than their mean.
    return min(length, prune.target(length) + since + config.least_chunk + config.page_size)


def longest(request: Request, config: SchedulerConfig) -> int:
    """Most tokens of the request's sequences, prompt and output, that context and pool allow, alone in the pool.

    Where positions close up, the context holds what is stored, not what was read.
    """
    prune = request.prune
    if prune is None or not stays_bounded(prune, config):
        return config.max_length
    prompt = len(request.prompt_ids)
    context = min(prune.context or prompt, prompt)
    closes_up = prune.positions == "cache"
    low, high = config.max_length, max(config.max_model_len, config.max_stream_len if closes_up else 0)
    while low < high:
        middle = (low + high + 1) // 2
        stored = middle - 1  # the last token is never computed
        entries = most_entries(prune, config, stored, min(context, stored))
        if entries < config.max_model_len and config.pages_pruned(entries, stored) <= config.num_pages:
            low = middle
        else:
            high = middle - 1
    return low
