"""Pruning beside what else a request may ask for: a scored prompt, stops, seeds, the operator's default."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from quire.core.pruning import PruneParams
from quire.pruning.table import POLICIES

from .conftest import RunningServer, start_server
from .kept_oracle import hide, load_reference
from .test_pruning_matrix import Serving, params, prompt, save

PROMPT = "timeout_limit = 4817\n\ndef connect(host, port):\n    pass\n\n" * 24 + "timeout_limit ="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_a_prompt_is_scored_by_what_was_kept_then(model: Path, policy: str) -> None:
    serving, ids = Serving(model), prompt(61)
    serving.submit("a", ids, params(policy), prompt_logprobs=0)
    serving.run()
    serving.check()
    (life,) = serving.recorder.lives["a", 0]
    early = min(life.forgotten.values()) < len(ids)
    assert early == (policy != "kvzip")
    reference = load_reference(model)
    said = [*ids, *serving.tokens["a", 0]]
    hide(life, reference.config, len(said))
    logits = reference(input_ids=torch.tensor([said]), use_cache=False).logits[0, : len(ids) - 1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    told = torch.tensor(serving.prompt_logprobs["a", 0])
    torch.testing.assert_close(told, expected, atol=2e-4, rtol=1e-3)


def test_a_stop_token_ends_a_pruned_sequence_where_it_comes(model: Path) -> None:
    serving = Serving(model, prefix_cache=False)
    sampled: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0}
    serving.submit("free", prompt(61), params("snapkv"), **sampled)
    serving.run()
    tokens = serving.tokens["free", 0]
    end = next(place for place in range(12, 30) if tokens[place] not in tokens[:place])
    serving.submit("stopped", prompt(61), params("snapkv"), stop_token_ids=(tokens[end],), **sampled)
    serving.run()
    serving.check()
    assert serving.tokens["stopped", 0] == tokens[: end + 1]
    assert serving.ended["free", 0].reason == "length" and serving.ended["stopped", 0].reason == "stop"


@pytest.mark.parametrize("own", [None, params("h2o", chunked=False)])
def test_a_seeded_text_does_not_change_beside_a_sequence_that_prunes(model: Path, own: PruneParams | None) -> None:
    serving = Serving(model, prefix_cache=False)
    for name, neighbours in (("alone", ()), ("beside", ("knorm", "snapkv", "h2o"))):
        for number, policy in enumerate(neighbours):
            serving.submit(policy, prompt(55, number + 1), params(policy), max_tokens=25, temperature=1.0)
        serving.submit(name, prompt(40), own, max_tokens=25, temperature=1.0, n=2)
        serving.run()
    assert serving.recorder.compactions >= 6
    for index in range(2):
        assert serving.tokens["beside", index] == serving.tokens["alone", index]
        told, expected = serving.logprobs["beside", index], serving.logprobs["alone", index]
        torch.testing.assert_close(torch.tensor(told), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert serving.tokens["alone", 0] != serving.tokens["alone", 1]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Prunes whoever does not object."""
    running = start_server("--prune-policy", "knorm", "--prune-keep", "0.6", "--prune-min-keep", "0.5")
    yield running
    assert running.stop() == 0


def complete(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def test_the_operators_default_holds_for_whoever_does_not_object(server: RunningServer) -> None:
    pruned, whole = complete(server).json(), complete(server, prune=False).json()
    use, tokens = pruned["usage"]["kv_cache"], whole["usage"]["prompt_tokens"] + 15
    assert use["policy"] == "knorm" and use["dropped_entries"] > 0.25 * tokens
    assert use["kept_entries"] + use["dropped_entries"] == pytest.approx(tokens)
    assert "kv_cache" not in whole["usage"]
    kept_all = complete(server, prune={"policy": "knorm", "keep": 1.0}).json()
    assert kept_all["choices"][0]["text"] == whole["choices"][0]["text"]


def test_less_than_the_operator_allows_is_refused(server: RunningServer) -> None:
    refused = complete(server, prune={"policy": "knorm", "keep": 0.4})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "prune.keep" and "0.5" in error["message"]
    assert complete(server, prune={"policy": "knorm", "keep": 0.5}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_pruned_sequence_and_frees_its_pages(server: RunningServer, stream: bool) -> None:
    whole = complete(server).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:4]
    answer = complete(server, stop=[stop], max_tokens=2000, stream=stream)
    if not stream:
        choice = answer.json()["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    assert answer.status_code == 200 and '"finish_reason":"stop"' in answer.text
    server.wait_until(lambda: server.metric("quire:kv_pages_used") == 0)
