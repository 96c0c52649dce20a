"""Which requests are taken at all: what is checked here can never fail later for the same reason."""

from collections.abc import Iterable

from ..core.errors import ContextLengthError, InvalidRequestError
from ..core.request import Request
from .config import SchedulerConfig


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Raise `InvalidRequestError` or `ContextLengthError`, naming what is wrong, unless the request can be served."""
    params = request.params
    if not request.prompt_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    _check_ids("the prompt", request.prompt_ids, config.vocab_size, "prompt")
    _check_ids("stop_token_ids", params.stop_token_ids, config.vocab_size, "stop_token_ids")
    _check_ids("logit_bias", params.logit_bias, config.vocab_size, "logit_bias")
    if params.n > config.max_waiting:
        raise InvalidRequestError(
            f"n is {params.n:,} but at most {config.max_waiting:,} sequences can wait here", param="n"
        )
    _check_pruning(request, config)
    _check_length(request, config)


def _check_pruning(request: Request, config: SchedulerConfig) -> None:
    if request.prune is None:
        return
    policy = config.policies.get(request.prune.policy)
    if policy is None:
        known = ", ".join(sorted(config.policies)) or "none"
        raise InvalidRequestError(
            f"there is no pruning policy {request.prune.policy[:50]!r}; known: {known}", param="prune.policy"
        )
    if policy.obstacle:
        raise InvalidRequestError(
            f"the policy {request.prune.policy!r} cannot prune this model: {policy.obstacle}", param="prune.policy"
        )
    for refinement in request.prune.refine:
        if refinement not in config.refinements:
            raise InvalidRequestError(
                f"the refinement {refinement!r} does not work with this model: it needs the output projection of its "
                "attention, which was not found",
                param="prune.refine",
            )
    if policy.repeats:
        _check_ids("the repeat instruction", request.repeat_ids, config.vocab_size, "prune.policy")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int, param: str) -> None:
    ids = tuple(ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"{name} has the token id {wrong}, but ids go from 0 to {vocab_size - 1:,}", param=param
        )


def _check_length(request: Request, config: SchedulerConfig) -> None:
    prompt, limit, wanted = len(request.prompt_ids), config.max_length, request.params.max_tokens
    holder = "the model's context" if limit == config.max_model_len else "the KV cache"
    if prompt >= limit:
        raise ContextLengthError(
            f"the prompt has {prompt:,} tokens but {holder}, one generated token included, holds at most "
            f"{limit:,} tokens",
            param="prompt",
        )
    if wanted is not None and prompt + wanted > limit:
        raise ContextLengthError(
            f"the prompt has {prompt:,} tokens and max_tokens asks for {wanted:,} more, but {holder} holds at most "
            f"{limit:,} tokens",
            param="max_tokens",
        )
