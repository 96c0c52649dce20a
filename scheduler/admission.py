"""Which requests are taken at all: what is checked here can never fail later for the same reason."""

from collections.abc import Iterable

from ..core.errors import ContextLengthError, InvalidRequestError, OverloadedError
from ..core.request import Request
from .config import SchedulerConfig
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
    _check_length(request, config)


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
