"""What the stand-in for the engine says: a hash of what each head sees; and what it must say, without any pages."""

import zlib

import numpy as np

from quire.core.request import Request
from quire.scheduler.scheduler import SchedulerConfig
from quire.scheduler.sequence import choice_seed


def next_token(seed: int, views: list[np.ndarray], blocked: set[int], vocab_size: int) -> int:
    """The token after what the heads see; views: int32 [entries, 2] of (position, token), one per head."""
    digest = zlib.crc32(seed.to_bytes(8, "little"))
    for view in views:
        digest = zlib.crc32(np.ascontiguousarray(view, np.int32).tobytes(), digest)
    token = digest % vocab_size
    while token in blocked:
        token = (token + 1) % vocab_size
    return token


def stop_ids(request: Request, config: SchedulerConfig) -> set[int]:
    """Tokens that end the request's sequences."""
    return set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else set(config.eos_token_ids))


def expected_output(request: Request, index: int, config: SchedulerConfig) -> tuple[list[int], str]:
    """(tokens, finish reason) of a choice when it runs alone, by the rules and without pages."""
    params, ends = request.params, stop_ids(request, config)
    output: list[int] = []
    limit = config.max_length - len(request.prompt_ids) if params.max_tokens is None else params.max_tokens
    while True:
        tokens = np.array([*request.prompt_ids, *output], np.int32)
        entries = np.stack([np.arange(len(tokens), dtype=np.int32), tokens], axis=1)
        views = [entries[-window:] if window else entries for window in config.windows]
        views = [view for view in views for _ in range(config.num_kv_heads)]
        blocked = ends if len(output) < params.min_tokens else set()
        token = next_token(choice_seed(request.seed, index), views, blocked, config.vocab_size)
        output.append(token)
        if token in ends and token not in blocked:
            return output, "stop"
        if len(output) == limit:
            return output, "length"
