"""The cost model finds synthetic costs again, and prompts are cut to them."""

import random
from dataclasses import replace

import pytest

from quire.core.plan import BatchPlan, StepOutput
from quire.scheduler.step_cost import StepCost

from .fake_engine import FakeEngine
from .world import World, make_config, make_request


def trained(a: float, b: float, c: float, noise: float = 0.0, steps: int = 200) -> StepCost:
    """A model after steps of these costs (seconds, per prompt token, per decode)."""
    rng, cost = random.Random(3), StepCost()
    for _ in range(steps):
        tokens, decodes = rng.choice([0, 16, 64, 500]), rng.randint(1, 30)
        cost.learn(tokens, decodes, (a + b * tokens + c * decodes) * (1 + rng.uniform(-noise, noise)))
    return cost


def test_costs_are_found_again():
    cost = trained(0.004, 0.0001, 0.0002)
    assert cost.seconds(0, 0) == pytest.approx(0.004, rel=0.02)
    assert cost.seconds(300, 10) == pytest.approx(0.036, rel=0.01)
    assert trained(0.004, 0.0001, 0.0002, noise=0.3).seconds(300, 10) == pytest.approx(0.036, rel=0.15)


def test_chunks_fit_the_time_in_whole_pages():
    cost = trained(0.004, 0.0001, 0.0002)
    for target, decodes in ((0.03, 10), (0.05, 1), (0.02, 30)):
        tokens = cost.prompt_tokens_within(target, decodes, 16)
        assert tokens % 16 == 0 and cost.seconds(tokens, decodes) <= target
        assert cost.seconds(tokens + 32, decodes) > target


def test_prompts_always_go_on():
    cost = trained(0.004, 0.0001, 0.0002)
    assert cost.prompt_tokens_within(0.001, 30, 16) == 16
    assert StepCost().prompt_tokens_within(10.0, 1, 16) == 16


def test_prompt_tokens_that_look_free_do_not_break_what_is_late_anyway():
    cost = StepCost()
    for i in range(40):
        cost.learn(0 if i % 2 else 64, 2, 0.02 if i % 2 else 0.01)
    assert cost.seconds(64, 2) == cost.seconds(0, 2)
    assert cost.prompt_tokens_within(0.001, 2, 16) == 16
    assert cost.prompt_tokens_within(1.0, 2, 16) == 128


def test_chunks_grow_beyond_what_was_seen_step_by_step():
    cost = StepCost()
    for _ in range(10):
        cost.learn(16, 2, 0.001)
    assert cost.prompt_tokens_within(100.0, 2, 16) == 32


def test_costs_that_change_are_followed_and_an_outlier_is_not():
    cost = trained(0.004, 0.0001, 0.0002)
    cost.learn(64, 10, 60.0)
    assert cost.seconds(300, 10) < 0.05
    rng = random.Random(4)
    for _ in range(400):
        tokens, decodes = rng.choice([0, 16, 64]), rng.randint(1, 30)
        cost.learn(tokens, decodes, 0.008 + 0.0002 * tokens + 0.0004 * decodes)
    assert cost.seconds(300, 10) == pytest.approx(0.072, rel=0.05)


def test_one_kind_of_step_and_steps_without_a_time_do_no_harm():
    cost = StepCost()
    for _ in range(100):
        cost.learn(32, 4, 0.01)
        cost.learn(5000, 4, 0.0)
    assert cost.seconds(32, 4) == pytest.approx(0.01, rel=0.01)
    assert cost.prompt_tokens_within(0.012, 4, 16) in (32, 48, 64)


class _TimedEngine(FakeEngine):
    """Says that a step took 10 ms, 1 ms per prompt token and 1 ms per decode."""

    def step(self, plan: BatchPlan) -> StepOutput:
        output = super().step(plan)
        return replace(output, forward_seconds=0.01 + 0.001 * plan.num_tokens)


def test_a_long_prompt_beside_decodes_stays_within_the_target_once_known():
    config = make_config(max_itl=0.05, max_batch_tokens=512, max_model_len=2048, num_pages=3000)
    world = World(config)
    world.engine = _TimedEngine(config)
    world.scheduler.add(make_request("decoding", max_tokens=400))
    world.step()
    sizes = []
    for number in range(3):
        world.scheduler.add(make_request(f"long{number}", prompt=[(7 * number + i) % 50 for i in range(900)]))
        while len(world.finished) < number + 1:
            plan = world.step()
            assert plan is not None
            sizes.append(plan.num_tokens)
    # 50 ms are 40 tokens, decodes included; the first steps only learn.
    assert all(size <= 41 for size in sizes[20:]) and max(sizes[20:]) > 30
    world.run()
    assert len(world.finished) == 4


def test_without_decodes_nothing_is_cut():
    world = World(make_config(max_itl=0.001, max_batch_tokens=32))
    world.scheduler.add(make_request(prompt=range(1, 41)))
    plan = world.step()
    assert plan is not None and plan.num_tokens == 32
    world.run()
