"""How the Triton attention cuts up a batch: plain arithmetic, no kernel."""

import pytest

from quire.kernels.attention_plan_triton import Launch, plan_launches, plan_unknown
from quire.kernels.tiles_triton import PLAIN_TILE, DeviceLimits, HeadShape, choose_tile, shared_bytes, split_count

HOPPER = DeviceLimits(90, 132, 227 * 1024, 228 * 1024)
AMPERE = DeviceLimits(86, 82, 99 * 1024, 100 * 1024)
TURING = DeviceLimits(75, 40, 64 * 1024, 64 * 1024)


def plan(lengths: tuple[int, ...], max_kept: int, heads: int = 32, kv_heads: int = 8) -> tuple[Launch, ...]:
    """Launches on Hopper, 16-bit heads of 128."""
    shape = HeadShape(128, 128, 2)
    return plan_launches(lengths, heads=heads, kv_heads=kv_heads, max_kept=max_kept, shape=shape, limits=HOPPER)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 5, 300), (300, 1, 17, 4, 16), (2000,) * 3])
@pytest.mark.parametrize("heads", [8, 32, 56, 1024])
def test_each_sequence_is_in_one_launch_with_enough_tiles(lengths: tuple[int, ...], heads: int) -> None:
    launches = plan(lengths, 4096, heads=heads)
    for sequence, length in enumerate(lengths):
        owners = [
            launch
            for launch in launches
            if launch.first_sequence <= sequence < launch.last_sequence and launch.shortest < length <= launch.longest
        ]
        assert len(owners) == 1
        tokens = owners[0].tile.rows // owners[0].group_tile
        assert not owners[0].one_tile or length <= tokens
        assert owners[0].group_tile * owners[0].group_tiles >= heads // 8
    for launch in launches:
        members = lengths[launch.first_sequence : launch.last_sequence]
        tokens = launch.tile.rows // launch.group_tile
        needed = sum(-(-n // tokens) for n in members if launch.shortest < n <= launch.longest)
        assert launch.tiles >= needed and launch.num_rows == sum(members)
        assert launch.first_row == sum(lengths[: launch.first_sequence])


@pytest.mark.parametrize("lengths", [(64,), (1,) * 64, (17, 16, 15, 1, 1, 0, 0), (9, 0, 0)])
@pytest.mark.parametrize("heads", [8, 32, 1024])
def test_one_launch_takes_rows_however_they_are_divided(lengths: tuple[int, ...], heads: int) -> None:
    rows, shape = sum(lengths), HeadShape(128, 128, 2)
    (launch,) = plan_unknown(rows, len(lengths), heads, 8, 4096, shape, HOPPER)
    tokens = launch.tile.rows // launch.group_tile
    ends = [sum(lengths[:i]) // tokens + i + -(-n // tokens) for i, n in enumerate(lengths)]
    assert max(ends) <= launch.tiles and launch.num_rows == rows
    assert launch.shortest < 1 and max(lengths) <= launch.longest


def test_splits_follow_occupancy() -> None:
    """One long sequence is split so that the device fills; a batch that fills it by itself is not."""
    (alone,), (many,) = plan((1,), 65536), plan((1,) * 512, 1024)
    assert alone.splits * 8 >= 132
    assert many.splits == 1
    assert plan((2000,), 2000)[0].splits == 1
    assert plan((1,), 64)[0].splits == 1


@pytest.mark.parametrize("programs", [1, 8, 100, 131, 133, 4000])
@pytest.mark.parametrize("entries", [64, 640, 100_000])
def test_split_count_is_in_bounds(programs: int, entries: int) -> None:
    splits = split_count(programs, 264, entries, 64)
    assert 1 <= splits <= -(-entries // 64)


@pytest.mark.parametrize("limits", [HOPPER, AMPERE, TURING])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chosen_tiles_fit_the_device(limits: DeviceLimits, width: int, rows: int, itemsize: int) -> None:
    shape = HeadShape(width, width, itemsize)
    tile = choose_tile(rows, shape, limits)
    assert shared_bytes(tile, shape, limits) <= limits.shared_memory
    assert (tile == PLAIN_TILE) == (itemsize == 4 or limits is TURING)
