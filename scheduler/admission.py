"""Which requests are taken at all: what is checked here can never fail later for the same reason."""

from collections.abc import Collection, Iterable, Mapping

from ..core.errors import ConfigError, ContextLengthError, InvalidRequestError, OverloadedError
from ..core.messages import EngineInfo
from ..core.pruning import PolicyInfo, PruneParams, Refinement
from ..core.request import Request
from .config import SchedulerConfig
from .footprint import longest
from .waiting import WaitingQueue


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


def check_default_pruning(prune: PruneParams, info: EngineInfo) -> None:
    """Raise `ConfigError` unless requests can be pruned so."""
    try:
        _check_policy(prune, info.policies, info.refinements)
    except InvalidRequestError as error:
        raise ConfigError(error.message, param="prune_policy") from error


def _check_pruning(request: Request, config: SchedulerConfig) -> None:
    if request.prune is None:
        return
    _check_policy(request.prune, config.policies, config.refinements)
    if config.policies[request.prune.policy].repeats:
        _check_ids("the instruction to repeat", request.repeat_ids, config.vocab_size, "prune.policy")


def _check_policy(prune: PruneParams, policies: Mapping[str, PolicyInfo], refinements: Collection[Refinement]) -> None:
    """Raise `InvalidRequestError`, naming the field, if the model cannot be pruned so."""
    policy, fault, field = policies.get(prune.policy), "", "policy"
    if policy is None:
        known = ", ".join(sorted(policies)) or "none"
        fault = f"there is no pruning policy {prune.policy[:50]!r}; known: {known}"
    elif prune.positions == "cache" and not policy.closes_up:
        closing = ", ".join(sorted(name for name, info in policies.items() if info.closes_up))
        which = f"goes with: {closing}" if closing else "needs Quire's own model code and no sliding windows"
        fault, field = f"prune.positions 'cache' {which}", "positions"
    elif policy.obstacle:
        fault = f"the policy {prune.policy!r} cannot prune this model: {policy.obstacle}"
    elif prune.when == "pressure" and not policy.relieves:
        why = "frees nothing" if policy.selects else "prunes once, when the model has repeated the prompt"
        fault, field = f"the policy {prune.policy!r} cannot prune under pressure: it {why}", "when"
    elif missing := [refinement for refinement in prune.refine if refinement not in refinements]:
        fault = f"the refinement {missing[0]!r} needs the output projection of attention, which this model hides"
        field = "refine"
    if fault:
        raise InvalidRequestError(fault, param=f"prune.{field}")


def check_room(request: Request, queue: WaitingQueue, config: SchedulerConfig, now: float) -> None:
    """Raise `OverloadedError` if the queue has no room for all of the request's choices at clock time `now`.

    A prompt longer than all that may wait is taken when none does: else it could never be served.
    """
    choices = request.params.n
    places = len(queue) + choices - config.max_waiting
    tokens = 0
    if config.max_waiting_tokens is not None and queue.num_tokens:
        tokens = queue.num_tokens + choices * len(request.prompt_ids) - config.max_waiting_tokens
    if places <= 0 and tokens <= 0:
        return
    seconds = queue.retry_after(max(places, 0), max(tokens, 0), now)
    waiting = f"{len(queue):,} sequences" if places > 0 else f"{queue.num_tokens:,} prompt tokens"
    raise OverloadedError(f"the queue is full ({waiting} wait); try again in {seconds:.0f} s", retry_after=seconds)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int, param: str) -> None:
    ids = tuple(ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"{name} has the token id {wrong}, but ids go from 0 to {vocab_size - 1:,}", param=param
        )


def _check_length(request: Request, config: SchedulerConfig) -> None:
    prompt, limit, wanted = len(request.prompt_ids), longest(request, config), request.params.max_tokens
    if limit <= config.max_model_len:
        holder = "the model's context" if limit == config.max_model_len else "the KV cache"
    else:
        holder = "a stream that is pruned so"
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
