"""Events that are encoded around their text are the same bytes as events encoded whole."""

from typing import Any

import pytest

from quire.server.generation import Delta
from quire.server.responses import ChatFormat, CompletionFormat, Heading, Usage
from quire.server.schemas import StreamOptions
from quire.server.streaming import _EventEncoder, server_sent_event
from quire.server.text import Tokenizer

TEXTS = ["a", 'say "\\" \n\t\0\x7f', "naïve 한글 \U0001f600 \u2028", "\\u0000", '{"text":""}', "a"]


@pytest.mark.parametrize("kind", [ChatFormat, CompletionFormat])
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("usage_asked", [None, False, True])
def test_frames_change_no_byte(
    tokenizer: Tokenizer, kind: type[ChatFormat] | type[CompletionFormat], logprobs: bool, usage_asked: bool | None
) -> None:
    style = kind(Heading("id-1", 'a "model" \\u0000', 7, logprobs), tokenizer)
    options = StreamOptions(include_usage=usage_asked is not None, continuous_usage_stats=bool(usage_asked))
    usage = Usage(prompt_tokens=3)
    encoder = _EventEncoder(style, usage, options)
    for number, text in enumerate(TEXTS):
        delta = Delta(number % 2, text, num_tokens=1, finish_reason="stop" if number == len(TEXTS) - 1 else None)
        usage.add(delta)
        more: dict[str, Any] = {} if usage_asked is None else {"usage": usage.body() if usage_asked else None}
        assert encoder.events(delta) == [server_sent_event(body | more) for body in style.chunks(delta)]
    assert encoder.events(Delta(0)) == []
