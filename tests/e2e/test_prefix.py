"""Reused prefixes change no token: a real tiny model in float32, with the prefix cache and without.

Prompts share beginnings that end on and off block borders, come again whole, and continue former answers. Each text is
compared with what an engine without the cache gives for the request alone.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, StepReport, Tokens, single_events
from quire.core.request import Request, SamplingParams
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop

from .conftest import MODEL_NAME, RunningServer

PAGE = 4
OUTPUT = 10
VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def save(folder: Path, **changes: Any) -> Path:
    """A random tiny Llama."""
    torch.manual_seed(11)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


def load(model: Path, **settings: Any) -> EngineLoop:
    """An engine with small pages on the CPU."""
    options: dict[str, Any] = {"page_size": PAGE, "max_num_seqs": 8, "max_batch_tokens": 32} | settings
    config = EngineConfig(**{"model": str(model), "device": "cpu", "dtype": "float32", "draft": "none"} | options)
    return load_in_process(config)


class Client:
    """Submits requests to a loop and collects what each choice gets."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.first: dict[tuple[str, int], Tokens] = {}
        """What brought the first token."""
        self.ended: dict[tuple[str, int], Finished] = {}

    def submit(self, name: str, prompt: list[int], *, salt: str = "", **params: Any) -> Request:
        """Greedy unless `params` say otherwise."""
        settings = {"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True} | params
        request = Request(
            id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**settings), seed=5, cache_salt=salt
        )
        self.loop.submit(request)
        return request

    def step(self) -> StepReport:
        """One checked step."""
        report = self.loop.step()
        self.loop.scheduler.check_integrity()
        for event in single_events(report.events):
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens):
                self.tokens[event.request_id, event.index] += event.token_ids
                if event.token_ids:
                    self.first.setdefault((event.request_id, event.index), event)
            elif isinstance(event, Finished):
                self.ended[event.request_id, event.index] = event
        return report

    def drain(self) -> None:
        """Step until nothing is left."""
        while self.loop.has_work:
            self.step()
        assert self.loop.stats().pages_used == 0

    def ask(self, name: str, prompt: list[int], **options: Any) -> list[int]:
        """The first choice's tokens, alone."""
        self.submit(name, prompt, **options)
        self.drain()
        return self.tokens[name, 0]

    def cached(self, name: str, index: int = 0) -> int:
        """Prompt tokens of a choice that the cache had."""
        return self.first[name, index].cached_tokens


def tokens(count: int, seed: int) -> list[int]:
    """Random ids."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def alone(loop: EngineLoop, request: Request, index: int = 0) -> list[int]:
    """What a request gives by itself, on a loop without prefix cache."""
    client = Client(loop)
    loop.submit(request)
    client.drain()
    return client.tokens[request.id, index]


@pytest.mark.parametrize("chunk", [8, 13, 512])
def test_shared_prefixes_on_and_off_block_borders(model: Path, chunk: int) -> None:
    client, plain = Client(load(model, max_batch_tokens=chunk)), load(model, prefix_cache=False)
    shared = tokens(41, seed=1)
    requests = []
    for number, length in enumerate((41, 41, 40, 39, 37, 36, 35, 17, 16, 4, 3)):
        for more in (0, 1, 7):
            name = f"{number}-{more}"
            requests.append(client.submit(name, shared[:length] + tokens(more, seed=number), logprobs=0))
            client.step()
    client.drain()
    for request in requests:
        assert client.tokens[request.id, 0] == alone(plain, request), request.id
    assert client.cached("1-0") == 40 and client.cached("2-0") == 36 and client.cached("10-0") == 0
    stats = client.loop.stats()
    assert stats.prefix_hits_total == sum(first.cached_tokens for first in client.first.values())
    assert stats.prefix_queries_total == sum(len(request.prompt_ids) for request in requests)
    computed = stats.prompt_tokens_total
    assert computed == stats.prefix_queries_total - stats.prefix_hits_total


def test_turns_of_a_dialogue_reuse_prompts_and_answers(model: Path) -> None:
    client, plain = Client(load(model)), load(model, prefix_cache=False)
    dialogue, known = tokens(9, seed=2), 1
    for turn in range(5):
        request = client.submit(str(turn), dialogue)
        client.drain()
        answer = client.tokens[str(turn), 0]
        assert answer == alone(plain, request)
        # All of the turn before but its last token, which was never computed, and what fills no page.
        assert client.cached(str(turn)) == (known - 1) // PAGE * PAGE
        known = len(dialogue) + len(answer)
        dialogue += answer + tokens(turn, seed=turn)


def test_choices_compute_their_prompt_once(model: Path) -> None:
    client, plain = Client(load(model, max_batch_tokens=16)), load(model, prefix_cache=False)
    request = client.submit("r", tokens(43, seed=3), n=3, temperature=1.0)
    client.drain()
    for index in range(3):
        assert client.tokens["r", index] == alone(plain, request, index)
    assert [client.cached("r", index) for index in range(3)] == [0, 40, 40]
    assert client.loop.stats().prompt_tokens_total == 43 + 2 * 3


def small_pool(model: Path, bundles: int) -> EngineLoop:
    """An engine whose pool holds so many blocks."""
    info = load(model).engine.info
    heads = info.model.num_layers * info.model.num_kv_heads
    return load(model, kv_memory=bundles * heads * info.kv_bytes // info.num_pages)


def test_preemption_and_reclaim_under_pressure(model: Path) -> None:
    client, plain = Client(small_pool(model, bundles=24)), load(model, prefix_cache=False)
    rng = random.Random(4)
    openings = [tokens(count, seed=count) for count in (8, 13, 24)]
    requests = []
    for number in range(40):
        prompt = rng.choice(openings) + tokens(rng.randint(0, 9), seed=number % 7)
        requests.append(client.submit(str(number), prompt, max_tokens=rng.randint(1, 30), n=rng.choice([1, 1, 3])))
        for _ in range(rng.randint(0, 3)):
            client.step()
        if number % 5 == 4:
            client.loop.abort(requests[number - 2].id)
    client.drain()
    for name, index in client.ended:
        assert client.tokens[name, index] == alone(plain, requests[int(name)], index)
        assert client.cached(name, index) <= len(requests[int(name)].prompt_ids)
    stats = client.loop.stats()
    assert stats.preemptions_total > 0 and stats.prefix_hits_total > 0
    assert len(client.ended) >= 32


def test_salts_keep_requests_apart(model: Path) -> None:
    client, prompt = Client(load(model)), tokens(30, seed=6)
    first = client.ask("plain", prompt)
    for name, salt, cached in (("again", "", 28), ("mine", "a", 0), ("theirs", "b", 0), ("mine again", "a", 28)):
        assert client.ask(name, prompt, salt=salt) == first
        assert client.cached(name) == cached, name


def test_scored_prompts_are_computed_whole(model: Path) -> None:
    client, prompt = Client(load(model)), tokens(30, seed=7)
    first = client.ask("plain", prompt)
    assert client.ask("scored", prompt, prompt_logprobs=0) == first
    assert client.cached("scored") == 0
    assert client.ask("after", prompt + first[:3]) == first[3:] + client.tokens["after", 0][-3:]
    assert client.cached("after") == 32


def test_an_abort_leaves_what_was_computed(model: Path) -> None:
    client, plain = Client(load(model, max_batch_tokens=8)), load(model, prefix_cache=False)
    prompt = tokens(40, seed=8)
    client.submit("gone", prompt)
    for _ in range(3):
        client.step()
    client.loop.abort(RequestId("gone"))
    request = client.submit("next", prompt)
    client.drain()
    assert client.cached("next") == 24
    assert client.tokens["next", 0] == alone(plain, request)


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_keys_rotated_for_another_length_are_not_reused(tmp_path: Path, runner: str) -> None:
    folder = save(tmp_path, max_position_embeddings=40, rope_parameters=DYNAMIC)
    settings = {"runner": runner, "max_model_len": 120}
    client, plain = Client(load(folder, **settings)), load(folder, prefix_cache=False, **settings)
    prompt, lengths = tokens(30, seed=9), (5, 8, 60, 60, 50, 10)
    for number, length in enumerate(lengths):
        request = client.submit(str(number), prompt, max_tokens=length)
        client.drain()
        assert client.tokens[str(number), 0] == alone(plain, request)
    # Up to 40 tokens all rotate alike; beyond, each length has its own frequencies.
    assert [client.cached(str(number)) for number in range(len(lengths))] == [0, 28, 0, 28, 0, 28]


def test_models_with_windows_publish_nothing(tmp_path: Path) -> None:
    torch.manual_seed(12)
    transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=9)).save_pretrained(tmp_path)
    client = Client(load(tmp_path))
    prompt = tokens(30, seed=10)
    assert client.ask("a", prompt) == client.ask("b", prompt)
    assert client.cached("b") == client.loop.stats().pages_cached == client.loop.stats().prefix_queries_total == 0


def test_a_server_tells_what_it_did_not_compute(server: RunningServer) -> None:
    def cached(salt: str) -> tuple[int, str]:
        completion = server.client().completions.create(
            model=MODEL_NAME, prompt=tokens(50, seed=13), max_tokens=4, temperature=0, extra_body={"cache_salt": salt}
        )
        usage = completion.usage
        assert usage is not None and usage.prompt_tokens == 50 and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0, completion.choices[0].text

    counts, texts = zip(*(cached(salt) for salt in ("a", "a", "b")), strict=True)
    assert counts == (0, 48, 0)
    assert len(set(texts)) == 1
    assert server.metric("vllm:prefix_cache_queries_total") == 150
    assert server.metric("vllm:prefix_cache_hits_total") == 48
    assert server.metric("quire:kv_pages_used") == 0 < server.metric("quire:kv_pages_cached")
