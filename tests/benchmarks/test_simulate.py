"""The simulator: nothing is lost, its numbers follow from its parts, and the command line says what is wrong."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.simulation.device import DEVICES  # noqa: E402
from benchmarks.simulation.driver import Limits, Simulation  # noqa: E402
from benchmarks.simulation.results import Histogram, Result  # noqa: E402
from benchmarks.simulation.traffic import WORKLOADS, Arrivals, Traffic  # noqa: E402

H200 = DEVICES["h200"]


def traffic(**changes: object) -> Traffic:
    """Chats of three tenants, one of which asks for four times as much, faster than they can be served."""
    values = {"requests": 100, "rate": 60.0, "variation": 3.0, "tenants": 3, "flood": 4.0, "shared": 64}
    return replace(Traffic(WORKLOADS["chat"], requests=1, rate=1.0), **values | changes)  # type: ignore[arg-type]


def drawn(load: Traffic) -> tuple[int, int]:
    """(requests, output tokens) that the traffic consists of, drawn without any scheduler."""
    requests = tokens = 0
    for tenant in range(load.tenants):
        for turn in load.conversations(tenant):
            conversation = turn.conversation
            while conversation.turns_left:
                conversation.speak()
                requests, tokens = requests + 1, tokens + conversation.output
                conversation.answered()
    return requests, tokens


def run(device: object = H200, load: Traffic | None = None, **limits: int) -> Result:
    return Simulation(device, load or traffic(), Limits(**limits)).run()  # type: ignore[arg-type]


def test_every_request_of_an_overload_ends_and_tokens_add_up() -> None:
    tight = replace(H200, kv_memory=6_000 * H200.model.kv_bytes)
    result = run(tight, traffic(max_model_len=8000), max_num_seqs=32)
    assert (result.finished, result.tokens) == drawn(traffic(max_model_len=8000))
    assert not result.failures and result.stats.preemptions_total > 0
    assert result.itl.counts.sum() == result.tokens - result.finished
    assert result.ttft.counts.sum() == result.e2e.counts.sum() == result.finished
    assert result.stats.prefix_hits_total > 0
    assert [tenant.requests for tenant in result.tenants] == [traffic().quota(tenant) for tenant in range(3)]


def test_a_full_queue_sends_clients_away_and_they_come_again() -> None:
    result = run(max_num_seqs=4, max_waiting=5)
    assert result.refusals > 0 and result.finished == drawn(traffic())[0]


def test_a_run_follows_from_its_seed() -> None:
    first, again, other = (run(load=traffic(seed=seed, requests=60)) for seed in (1, 1, 2))
    assert first.summary() == again.summary() != other.summary()


def test_a_request_alone_takes_what_the_device_says() -> None:
    load = replace(traffic(requests=1, tenants=1, shared=0), lengths=WORKLOADS["conversation"])
    turn = next(load.conversations(0))
    turn.conversation.speak()
    result = run(load=load)
    alone = H200.request_seconds(len(turn.conversation.prompt), turn.conversation.output)
    assert result.seconds == pytest.approx(alone, rel=1e-3) and result.tenants[0].worst == pytest.approx(1, rel=1e-3)


def test_a_tenant_alone_asks_for_the_same() -> None:
    assert run(load=traffic(only=1)).tenants[1].tokens == run().tenants[1].tokens


@pytest.mark.parametrize("variation", [1.0, 3.0])
def test_arrivals_have_rate_and_variation(variation: float) -> None:
    load = Traffic(WORKLOADS["coding"], requests=20_000, rate=5.0, variation=variation)
    times = np.array([turn.time for turn in load.conversations(0)])
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_arrivals_come_in_order_and_those_put_back_too() -> None:
    arrivals, seen = Arrivals(traffic()), []
    now, rng = 0.0, random.Random(1)
    while arrivals.next_time < math.inf:
        assert arrivals.next_time >= now
        now = arrivals.next_time
        for turn in arrivals.due(now):
            seen.append(turn)
            if rng.random() < 0.2:
                arrivals.put_back(now + rng.random(), turn)
    assert len(seen) > len({id(turn) for turn in seen}) == sum(1 for t in range(3) for _ in traffic().conversations(t))


def test_lengths_have_the_published_means() -> None:
    load = Traffic(WORKLOADS["conversation"], requests=4000, rate=1.0)
    prompts, outputs = [], []
    for turn in load.conversations(0):
        turn.conversation.speak()
        prompts.append(len(turn.conversation.prompt))
        outputs.append(turn.conversation.output)
    assert np.mean(prompts) == pytest.approx(1155, rel=0.05) and np.mean(outputs) == pytest.approx(211, rel=0.1)


def test_percentiles_of_a_histogram() -> None:
    histogram, values = Histogram(), np.random.default_rng(1).lognormal(size=10_000)
    histogram.add(values)
    for percent in (1, 50, 99):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=0.03)
    assert math.isnan(Histogram().percentile(50))


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "simulate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(tmp_path: Path) -> None:
    small = ["--requests", "60", "--max-num-seqs", "8", "--tenants", "2", "--fairness", "--load", "2"]
    result = script(*small, "--json", str(tmp_path / "out.json"), "--set", "prefix_cache=false")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["requests"] == 60 and summary["prefix_hit_rate"] == 0 and not summary["failed"]
    assert all(tenant["by_fair_share"] > 0 for tenant in summary["tenants"])


@pytest.mark.parametrize("change, message", [("speed=9", "no setting 'speed'"), ("page_size=x", "page_size=x")])
def test_a_wrong_setting_is_one_line(change: str, message: str) -> None:
    result = script("--requests", "1", "--set", change)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
