"""Host memory behind the pool, on a real tiny model in float32: swapping and host hits change no token."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.request import Request, SamplingParams, SeedSource
from quire.scheduler.loop import EngineLoop
from quire.scheduler.sequence import SequenceState
from quire.scheduler.snapshot import load_cache, save_cache
from quire.scheduler.swap import SwapCosts

from .test_prefix import SHAPE, Client, alone, load, save, tokens

HOST = 2**22


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with a window and two without: heads keep different numbers of entries."""
    folder = tmp_path_factory.mktemp("windowed")
    torch.manual_seed(12)
    kinds = ["full_attention", "sliding_attention"] * 2
    shape = SHAPE | {"num_hidden_layers": 4}
    config = transformers.Qwen2Config(
        **shape, use_sliding_window=True, sliding_window=9, layer_types=kinds, max_window_layers=0
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def small(model: Path, bundles: int, **settings: Any) -> EngineLoop:
    """An engine whose pool holds so many blocks."""
    info = load(model, kv_memory=2**20).engine.info
    heads = info.model.num_layers * info.model.num_kv_heads
    return load(model, kv_memory=bundles * heads * info.kv_bytes // info.num_pages, **settings)


class Watched(Client):
    """Compares every shared page before and after each step."""

    def step(self) -> Any:
        before = self._shared()
        report = super().step()
        pool = self.loop.engine.cache.pool  # type: ignore[attr-defined]
        for bundle, (pages, contents) in before.items():
            if bundle.pages is pages and bundle in set(self.loop.scheduler._cache._index):
                assert torch.equal(pool[torch.from_numpy(pages).long()], contents), "a shared page was changed"
        return report

    def _shared(self) -> dict[Any, Any]:
        pool = self.loop.engine.cache.pool  # type: ignore[attr-defined]
        bundles = [bundle for bundle in self.loop.scheduler._cache._index if bundle.pages is not None]
        return {bundle: (bundle.pages, pool[torch.from_numpy(bundle.pages).long()].clone()) for bundle in bundles}


def traffic(client: Client, seed: int, count: int = 20) -> list[Request]:
    """Requests at twice the rate at which they can be served, some of them cancelled."""
    rng, requests = random.Random(seed), []
    openings = [tokens(length, seed=length) for length in (8, 13, 24)]
    for number in range(count):
        prompt = rng.choice(openings) + tokens(rng.randint(0, 9), seed=number % 7)
        params: dict[str, Any] = {
            "max_tokens": rng.randint(1, 30),
            "n": rng.choice([1, 1, 3]),
            "repetition_penalty": 1.2,
        }
        requests.append(client.submit(str(number), prompt, **params))
        for _ in range(rng.randint(0, 2)):
            client.step()
        if number % 6 == 5:
            client.loop.abort(requests[number - 2].id)
    client.drain()
    return requests


@pytest.mark.parametrize("kind", ["model", "windowed"])
@pytest.mark.parametrize("recomputable", [True, False])
def test_swapping_changes_no_token(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, recomputable: bool
) -> None:
    model: Path = request.getfixturevalue(kind)
    client, plain = Watched(small(model, 24, swap_memory=HOST)), load(model, prefix_cache=False)
    coin = random.Random(1)  # what is measured of a model so small may always speak for the one or the other
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: coin.random() < 0.5)
    if not recomputable:
        monkeypatch.setattr(SequenceState, "is_exact", property(lambda sequence: False))
    requests = traffic(client, seed=4)
    for (name, index), _ in client.ended.items():
        assert client.tokens[name, index] == alone(plain, requests[int(name)], index), name
    stats = client.loop.stats()
    assert stats.swap_out_sequences_total >= stats.swap_in_sequences_total > 0
    assert recomputable == (stats.swap_out_sequences_total < stats.preemptions_total)
    assert stats.host_pages_parked == 0 and stats.swap_out_bytes_total > 0
    assert len(client.ended) >= 16


def test_a_sequence_comes_back_bit_by_bit(windowed: Path) -> None:
    client = Client(load(windowed, swap_memory=HOST))
    scheduler, cache = client.loop.scheduler, client.loop.engine.cache  # type: ignore[attr-defined]
    client.submit("r", tokens(30, seed=1), max_tokens=30)
    for _ in range(12):
        client.step()
    (sequence,) = scheduler._running

    def state() -> tuple[Any, ...]:
        rows, columns, pages = sequence.table.places()
        where = torch.from_numpy(pages).long()
        kept = sequence.table.kept.tolist()
        return kept, rows.tolist(), columns.tolist(), cache.pool[where].clone(), cache.entry_positions[where].clone()

    before, computed = state(), sequence.num_computed
    assert len(set(before[0])) > 1, "all heads keep alike"
    scheduler._preempt(sequence)
    others = scheduler._cache.take(100)  # comes back elsewhere
    plan = scheduler.plan()
    assert plan is not None and plan.assignments[0].restored is not None
    client.loop.engine._change_hands(plan)  # type: ignore[attr-defined]
    after = state()
    assert sequence.num_computed == computed
    assert before[:3] == after[:3] or before[0] == after[0]
    count = len(before[3])
    assert torch.equal(after[3][:count], before[3]) and torch.equal(after[4][:count], before[4])
    assert cache.kept[sequence.slot].flatten().tolist() == after[0]
    scheduler._cache.give(others)


def test_evicted_prefixes_come_back_from_the_host(model: Path) -> None:
    client, prompt = Client(small(model, 24, swap_memory=HOST)), tokens(40, seed=3)
    first = client.ask("first", prompt)
    for number in range(6):
        client.ask(f"other{number}", tokens(60, seed=20 + number))
    assert client.ask("again", prompt) == first
    assert client.cached("again") == 36
    assert client.loop.stats().prefix_host_hits_total > 0


def test_prefixes_outlast_a_restart(model: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "prefixes.safetensors", tokens(40, seed=5)
    # In the larger pool all stays on the device; from the smaller one, part of the first prompt has gone to the host.
    for bundles, settings in ((40, {}), (24, {"swap_memory": HOST})):
        client = Client(small(model, bundles, **settings))
        first = client.ask("first", prompt)
        client.ask("second", tokens(60, seed=6))
        save_cache(client.loop, path)
        again = Client(small(model, bundles, **settings))
        load_cache(again.loop, path)
        assert again.ask("again", prompt) == first
        assert again.cached("again") == 36
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_that_does_not_fit_or_is_broken_is_ignored(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, prompt = tmp_path / "prefixes", tokens(40, seed=5)
    client = Client(load(model))
    client.ask("first", prompt)
    save_cache(client.loop, path)
    whole = path.read_bytes()
    files = {"garbage": b"no tensors", "cut": whole[: len(whole) // 2], "empty": b""}
    for contents in files.values():
        path.write_bytes(contents)
        load_cache(client.loop, path)
    path.write_bytes(whole)
    other = Client(load(model, page_size=8))
    load_cache(other.loop, path)
    assert len([record for record in caplog.records if "not used" in record.message]) == 4
    other.ask("fresh", prompt)
    assert other.cached("fresh") == 0
    save_cache(client.loop, tmp_path / "no folder" / "file")
    assert "could not be written" in caplog.records[-1].message


def test_a_pinned_prompt_survives_what_evicts_others(model: Path) -> None:
    client, prompt = Client(small(model, 24)), tokens(20, seed=7)
    now = [0.0]
    client.loop.scheduler._cache.pins._clock = lambda: now[0]
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    pinned = Request.create("pinned", prompt, params, SeedSource(), cache_ttl=60.0)
    client.loop.submit(pinned)
    client.drain()
    assert client.first["pinned", 0].pinned_tokens == 20

    def crowd(name: str) -> None:
        for number in range(4):
            client.ask(f"{name}{number}", tokens(50, seed=40 + number))

    crowd("a")
    client.ask("hit", prompt)
    assert client.cached("hit") == 16
    now[0] = 61.0
    assert client.loop.stats().pages_pinned == 0
    crowd("b")
    client.ask("miss", prompt)
    assert client.cached("miss") == 0
