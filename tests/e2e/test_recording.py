"""What a recorded request tells of the model is the model's own distribution at each token, and nothing else changes.

Scheduler, engine and drafter are real, the model tiny, random and in float32; transformers says what is right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from msgspec.structs import replace

from quire.core.request import Request
from quire.core.top_rows import TOP_TOKENS, unpack_rows

from .speculating import Run, Stack, Told, assert_equal, save, save_like
from .test_parity import GQA
from .test_speculation_serving import POOL, requests

WAYS: dict[str, Callable[[Stack, list[Request], str], Run]] = {
    "plainly": lambda stack, asked, draft: stack.serve(asked),
    "ahead": lambda stack, asked, draft: stack.serve(asked, looks_ahead=True),
    "drafting": lambda stack, asked, draft: stack.serve(asked, stack.draft(draft)),
    "short of pages": lambda stack, asked, draft: stack.serve(asked, num_pages=POOL * stack.config.num_rows),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**GQA))


def check_rows(model: Any, prompt: tuple[int, ...], tokens: list[int], rows: list[bytes]) -> None:
    """Against a forward pass of the whole text."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    exact = logits.double().log_softmax(-1)
    ids, logs = (torch.from_numpy(part.astype(np.float64)) for part in unpack_rows(b"".join(rows), TOP_TOKENS))
    best = exact.gather(1, ids.long())
    # float16: eleven bits
    torch.testing.assert_close(logs[:, :-1], best, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(best, exact.topk(TOP_TOKENS).values, atol=1e-3, rtol=0)
    torch.testing.assert_close(logs[:, -1], (1 - best.exp().sum(1)).log(), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_what_the_model_says(folder: Path, tmp_path: Path, way: str) -> None:
    stack, model = Stack(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    draft = str(save_like(tmp_path, folder))
    asked = requests()
    unseen = WAYS[way](stack, asked, draft)
    run = WAYS[way](stack, [replace(request, record=True) for request in asked], draft)
    same: Told = run.told
    assert_equal(same, unseen.told)
    assert not any(choice.recorded for choice in unseen.told.values())
    for (name, _), choice in same.items():
        (prompt,) = (request.prompt_ids for request in asked if request.id == name)
        assert len(choice.recorded) >= len(choice.tokens) > 0
        check_rows(model, prompt, choice.tokens, choice.recorded[: len(choice.tokens)])
    if way == "ahead":
        assert run.ahead >= unseen.ahead > 0, "nobody waits for what is recorded"
    if way == "drafting":
        assert run.counts.accepted_tokens > 20
    if way == "short of pages":
        assert run.loop.stats().preemptions_total > 0
