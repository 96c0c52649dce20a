"""Who must repeat its prompt gets room for that, however little of a step others and a time limit leave."""

import msgspec

from quire.core.request import Request

from .test_pruning import pruned, world_of
from .world import World, make_request

INSTRUCTION = tuple(range(20, 34))


def repeating(name: str) -> Request:
    """It has 18 tokens to repeat behind an instruction of 14, so a part of them takes 22 tokens at least."""
    return msgspec.structs.replace(pruned(name, policy="repeating", max_tokens=4), repeat_ids=INSTRUCTION)


def decoding(world: World, count: int, max_tokens: int) -> None:
    """So many sequences that decode for long."""
    for index in range(count):
        world.scheduler.add(make_request(f"long {index}", max_tokens=max_tokens))
    for _ in range(3):
        world.step()


def test_a_time_limit_leaves_room_for_an_instruction():
    world = world_of(max_itl=1e-9, max_model_len=400, num_pages=600)
    decoding(world, 1, 300)
    world.scheduler.add(repeating("a"))
    for _ in range(40):
        world.step()
    assert len(world.tokens["a", 0]) == 4 and "long 0" not in world.finished
    assert world.scheduler.stats().prunes["repeating"].prunes == {"prompt": 1}


def test_a_full_step_is_waited_for_and_nobody_enters_before():
    """Eleven decodes leave 21 tokens of 32."""
    world = world_of(max_model_len=400, num_pages=2000, max_num_seqs=13)
    decoding(world, 11, 150)
    world.scheduler.add(repeating("a"))
    for _ in range(5):
        world.step()
    world.scheduler.add(make_request("later"))
    for _ in range(110):
        world.step()
    assert len(world.tokens["a", 0]) == 1 and not world.tokens["later", 0]
    world.run()
    assert not world.failed and len(world.tokens["a", 0]) == 4
    assert world.scheduler.stats().prunes["repeating"].prunes == {"prompt": 1}
