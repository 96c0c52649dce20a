"""The texts that a draft is distilled on: prompts of the user's own, logged traffic, or what the target says unasked.

A file has one JSON object a line: {"prompt": text}, {"messages": [...]} or {"prompt_ids": [...]}, with an answer as
"completion" (text) or "output_ids" if there is one, and a "domain" to be reported by. The last form is what
`quire serve --distill-log` writes, with a "target": what the model said at each of the output's tokens.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..core.errors import ConfigError, ModelLoadError
from ..core.top_rows import VERSION
from .target_rows import Logged

HELD_OUT_ONE_IN = 20
LARGEST_LOG = 0.01
"""Of a probability, as it may be rounded."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, what is known to follow it, and what kind of text it is."""

    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()
    domain: str = "text"
    logged: Logged | None = None
    """What the target said at each token of the output, before it was drawn."""


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The target's tokenizer; raises `ModelLoadError`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    # Anything may come out of a broken tokenizer file.
    except Exception as error:
        raise ModelLoadError(f"{model} has no usable tokenizer: {' '.join(str(error).split())[:300]}") from error
    return tokenizer


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Example]:
    """All examples of a file, in order. Raises `ConfigError`, naming the line, for what is none."""
    found = []
    for number, line in _lines(path):
        if line.strip():
            try:
                found.append(_example(json.loads(line), tokenizer, vocab_size))
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: {error}", param="data") from error
    if not found:
        raise ConfigError(f"{path} holds no prompts", param="data")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The file's lines with their numbers, one at a time: a log may be large."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="data") from error


def _example(content: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Example:
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    output = content.get("output_ids", [])
    if "prompt_ids" in content:
        prompt = content["prompt_ids"]
    elif "messages" in content:
        prompt, output = _conversation(content["messages"], tokenizer)
    elif isinstance(content.get("prompt"), str):
        prompt = tokenizer(content["prompt"])["input_ids"]
    else:
        raise ValueError("it has neither prompt, messages nor prompt_ids")
    if "completion" in content:
        if not isinstance(content["completion"], str):
            raise ValueError("its completion is no text")
        output = tokenizer(content["completion"], add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, list) or not isinstance(output, list):
        raise ValueError("prompt_ids and output_ids must be lists")
    for token in (*prompt, *output):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{token!r} is not a token of the target")
    if not prompt:
        raise ValueError("its prompt is empty")
    logged = _logged(content["target"], len(output), vocab_size) if "target" in content else None
    return Example(tuple(prompt), tuple(output), str(content.get("domain", "text")), logged)


def _logged(content: Any, count: int, vocab_size: int) -> Logged:
    """What a log has of the target's distributions at `count` tokens; raises `ValueError` or the like."""
    if not isinstance(content, dict) or not {"version", "top", "rows"} <= content.keys():
        raise ValueError("its target has not the version, top and rows of a log")
    if content["version"] != VERSION:
        raise ValueError(f"its target has version {content['version']!r}, known is {VERSION}")
    kept = content["top"]
    if not isinstance(kept, int) or not 0 < kept <= vocab_size:
        raise ValueError(f"its target has {kept!r} tokens in a row")
    logged = Logged(base64.b64decode(content["rows"], validate=True), kept)
    ids, logs = logged.distributions()
    if len(ids) != count:
        raise ValueError(f"its target has {len(ids)} rows for {count} tokens")
    if count and (int(ids.max()) >= vocab_size or not bool((logs <= LARGEST_LOG).all())):
        raise ValueError("its target has tokens or log-probabilities that cannot be")
    return logged


def _conversation(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens up to where the assistant speaks last, and of what it says if it does."""
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise ValueError("messages must be a list of objects, at least one")
    answered = messages[-1].get("role") == "assistant"
    asked = messages[:-1] if answered else messages
    try:
        prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False)) if answered else prompt
    except Exception as error:  # a template is a program: what it raises is its way of refusing
        raise ValueError(f"the chat template refuses the messages: {str(error)[:300]}") from error
    # A template may show earlier turns otherwise once there is a later one.
    answer = whole[len(prompt) :] if whole.startswith(prompt) else messages[-1].get("content")
    if not isinstance(answer, str):
        raise ValueError("its answer is no text")
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    return first, second


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(to train on, held out), told apart by the hash of the prompt, so that equal prompts stand on one side."""
    held = [_hash(example) % HELD_OUT_ONE_IN == 0 for example in examples]
    if all(held) or not any(held):
        # Few or equal prompts: the last one is held out, and of one alone the target's answers differ anyway.
        held = [index == len(examples) - 1 for index in range(len(examples))]
    train = [example for example, out in zip(examples, held, strict=True) if not out]
    return train or list(examples), [example for example, out in zip(examples, held, strict=True) if out]


def _hash(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(np.array(example.prompt, np.int64).tobytes()).digest()[:4], "big")
