"""From a server's log to training rows: what was logged says what a pass of the same weights by transformers says."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from quire.core.config import embedded_model
from quire.distill.distillation import whole_logits
from quire.distill.draft_init import load_model
from quire.distill.prompts import Example, load_tokenizer, read_examples
from quire.distill.rounds import Mixture, RowMaker
from quire.distill.target_rows import Recorder, Row, Shard, read_rows

from .conftest import MODEL_NAME, start_server

CODE = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return width * "
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "penalised": {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.5, "seed": 1},
    "choices": {"n": 2, "logprobs": 3},
    "streamed": {"stream": True},
    "stopped": {"temperature": 0, "stop": ["height"]},
    "pruned": {"prune": {"policy": "snapkv", "keep": 0.5, "floor": 16, "window": 8}},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server that drafts."""
    path = tmp_path_factory.mktemp("log") / "traffic.jsonl"
    running = start_server("--dtype", "float32", "--draft", "ngram", "--draft-tokens", "4", "--distill-log", str(path))
    for fields in ASKED.values():
        body = {"model": MODEL_NAME, "prompt": CODE, "ignore_eos": True, "max_tokens": 40} | fields
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=120).status_code == 200
    assert running.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    assert running.stop() == 0
    return path


def test_logged_rows_are_those_of_a_pass(log: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["target" in line for line in lines] == [True] * 6 + [False], "what may be pruned is not recorded"
    model, cpu = str(embedded_model()), torch.device("cpu")
    target = load_model(model, torch.float32)
    vocab_size = target.get_output_embeddings().weight.shape[0]
    # As close as transformers' own arithmetic goes: without the bfloat16 that makes passes of training quick.
    recorder = Recorder(lambda ids: target(input_ids=ids).logits, vocab_size, 20, 1.0, cpu)
    examples: list[Example] = read_examples(log, load_tokenizer(model), vocab_size)
    maker = RowMaker(examples, Mixture(1, 0, 0), 256, (1.0,), 0, model)
    logged = [row for row in map(maker.logged_row, examples) if row is not None]
    assert len(logged) == 6 and all(len(row.ids) - row.start > 4 for row in logged)
    recorder.write(tmp_path / "logged", logged)
    recorder.write(tmp_path / "passed", [Row(row.ids, row.start) for row in logged])
    places = [(0, number) for number in range(6)]
    one, other = (read_rows([Shard(tmp_path / name)], places, cpu) for name in ("logged", "passed"))
    assert torch.equal(one.valid, other.valid)
    assert (one.top_ids == other.top_ids)[one.valid].float().mean() > 0.99, "but for ties"
    torch.testing.assert_close(one.top_log[one.valid], other.top_log[one.valid], atol=0.02, rtol=2e-3)
    quick = Recorder(whole_logits(target), vocab_size, 20, 1.0, cpu)
    assert min(quick.agreement(row) for row in logged) > 0.97
