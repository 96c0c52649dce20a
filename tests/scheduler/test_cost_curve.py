"""What is measured of costs: outliers count for nothing, lasting changes soon, places tell something of each other."""

import numpy as np
import pytest

from quire.scheduler.cost_curve import CostCurve

POINTS = [(1, 1.0), (16, 4.0), (64, 16.0)]


def taught(times: int, count: int = 16, seconds: float = 4.0) -> CostCurve:
    curve = CostCurve(POINTS, 64)
    for _ in range(times):
        curve.learn(count, seconds)
    return curve


def test_what_was_measured_at_start_holds_until_something_is_learned():
    curve = CostCurve(POINTS, 256)
    assert [curve.one(count) for count in (0, 1, 16, 64)] == pytest.approx([0.0, 1.0, 4.0, 16.0])
    assert curve.one(127) == pytest.approx(31.0), "it goes on as steeply as on the whole"


@pytest.mark.parametrize("count", [1, 16, 40, 64])
def test_the_first_measurement_is_believed(count):
    curve = CostCurve(POINTS, 64)
    curve.learn(count, 2.5 * curve.one(count))
    assert curve.one(count) == pytest.approx(2.5 * CostCurve(POINTS, 64).one(count), rel=0.2)


@pytest.mark.parametrize("seconds", [0.4, 40.0])
def test_a_few_outliers_among_many_count_for_nothing(seconds):
    curve = taught(12)
    for _ in range(3):
        curve.learn(16, seconds)
    assert curve.one(16) == pytest.approx(4.0)


@pytest.mark.parametrize("seconds", [3.0, 8.0])
def test_a_lasting_change_counts_soon(seconds):
    curve = taught(50)
    for _ in range(18):
        curve.learn(16, seconds)
    assert curve.one(16) == pytest.approx(seconds, rel=0.05)


def test_what_is_known_well_does_not_move_by_what_is_new_elsewhere():
    curve = taught(30)
    curve.learn(12, 30.0)
    assert curve.one(16) == pytest.approx(4.0, rel=0.02), "more never costs less, and this is known better"
    assert curve.one(12) <= curve.one(16)
    curve.learn(32, 1.0)
    assert curve.one(16) == pytest.approx(4.0, rel=0.02)
    assert curve.one(32) >= curve.one(16)


def test_what_turns_out_in_one_place_holds_elsewhere_too_where_nothing_is_known():
    curve = taught(1, seconds=8.0)
    assert curve.one(64) > 18.0
    assert 1.2 < curve.one(1) < 2.0


def test_a_start_that_was_much_too_dear_is_dismissed_as_a_whole():
    curve = CostCurve([(1, 40.0), (64, 44.0)], 64)
    curve.learn(1, 1.0)
    assert [curve.one(count) for count in (1, 8, 64)] == pytest.approx([1.0, 1.0, 1.1], rel=0.1)


def test_more_never_costs_less_whatever_is_measured():
    rng = np.random.default_rng(3)
    curve = CostCurve(POINTS, 64)
    for _ in range(2000):
        curve.learn(int(rng.integers(1, 65)), float(rng.lognormal(1.0, 1.5)))
        values = curve.at(np.arange(65))
        assert (np.diff(values) >= -1e-9).all() and (values[1:] > 0.0).all()


def test_noise_averages_out():
    rng = np.random.default_rng(5)
    curve = CostCurve([(1, 3.0), (64, 3.0)], 64)
    for _ in range(3000):
        count = int(rng.integers(1, 65))
        curve.learn(count, (2.0 + 0.1 * count) * float(rng.uniform(0.9, 1.1)) * (3.0 if rng.random() < 0.05 else 1.0))
    counts = np.arange(1, 65)
    assert np.abs(curve.at(counts) / (2.0 + 0.1 * counts) - 1.0).mean() < 0.02


def test_what_was_measured_goes_along_with_a_change_of_pace():
    curve = taught(30)
    curve.scale(2.0)
    curve.learn(16, 8.0)
    assert curve.one(16) == pytest.approx(8.0)
    curve.shift(1.0)
    curve.learn(16, 9.0)
    assert curve.one(16) == pytest.approx(9.0)


def test_what_is_long_unseen_returns_to_the_shape_measured_at_start():
    curve = taught(30, seconds=12.0)
    for _ in range(50):
        curve.relax(16, 4.0, 0.2)
    assert curve.at(np.array([1, 16, 64])) == pytest.approx([1.0, 4.0, 16.0], rel=0.01)


def test_what_was_never_measured_costs_nothing_until_it_is():
    curve = CostCurve((), 8)
    assert curve.one(8) == 0.0
    curve.learn(4, 0.0)
    curve.learn(4, 2.0)
    assert curve.one(4) == pytest.approx(2.0)
