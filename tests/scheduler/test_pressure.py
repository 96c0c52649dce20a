"""Windows give pages back; preemption takes them, and no text shows it."""

import numpy as np

from quire.core.ids import RequestId

from .fake_engine import parts
from .fake_text import expected_output
from .world import World, make_config, make_request


def crowd(world: World, count: int, **params) -> list:
    """Add `count` requests of growing prompts."""
    requests = [make_request(f"r{i}", prompt=range(1, 6 + i), seed=i, **params) for i in range(count)]
    for request in requests:
        world.scheduler.add(request)
    return requests


def test_preemption_changes_no_token_and_emits_nothing_twice():
    world = World(make_config(num_pages=24, prefix_cache=False))
    requests = crowd(world, 4, max_tokens=25, logprobs=0)
    world.run()
    assert world.scheduler.stats().preemptions_total > 0
    for request in requests:
        assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]
    stats = world.scheduler.stats()
    assert stats.prompt_tokens_total == sum(len(request.prompt_ids) for request in requests)
    assert stats.generation_tokens_total == 4 * 25


def test_the_youngest_is_preempted_and_re_enters_before_new_ones():
    world = World(make_config(num_pages=24))
    crowd(world, 3, max_tokens=28)
    while world.scheduler.stats().preemptions_total == 0:
        world.step()
    world.scheduler.add(make_request("new", prompt=(9,), max_tokens=1))
    entered = []
    while (plan := world.step()) is not None:
        entered += [assignment.prompt_ids for assignment in plan.assignments]
    assert entered.index(tuple(range(1, 8))) < entered.index((9,))
    assert world.sequences["r0", 0].preemptions == 0
    assert world.sequences["r2", 0].preemptions >= 1


def test_a_preempted_sequence_brings_its_output_along():
    world = World(make_config(num_pages=24))
    crowd(world, 3, max_tokens=28)
    seen = []
    while (plan := world.step()) is not None:
        seen += [assignment.output_ids for assignment in plan.assignments]
    outputs = [output for output in seen if output]
    assert len(seen) > 3 and outputs
    assert all(any(tuple(tokens[: len(output)]) == output for tokens in world.tokens.values()) for output in outputs)


def test_abort_while_preempted():
    world = World(make_config(num_pages=24))
    crowd(world, 3, max_tokens=28)
    while world.scheduler.stats().preemptions_total == 0:
        world.step()
    assert world.scheduler.abort(RequestId("r2"))
    world.scheduler.check_integrity()
    world.run()
    assert sorted(world.finished) == [("r0", 0), ("r1", 0)]


def test_prompt_scores_survive_preemption_in_the_middle_of_a_prompt():
    world = World(make_config(num_pages=20, max_batch_tokens=4))
    world.scheduler.add(make_request("old", prompt=range(1, 4), max_tokens=34))
    world.step()
    world.scheduler.add(make_request("scored", prompt=range(1, 29), prompt_logprobs=0, max_tokens=4))
    world.run()
    assert world.sequences["scored", 0].preemptions >= 1
    assert world.prompt_scores["scored", 0] == world.engine.scored == list(range(2, 29))


def test_a_recomputed_prompt_is_cut_where_its_scores_ended():
    world = World(make_config(max_batch_tokens=8, prefix_cache=False))
    world.scheduler.add(make_request(prompt=range(1, 21), prompt_logprobs=0, max_tokens=2))
    world.step()
    (sequence,) = world.scheduler._running
    world.scheduler._preempt(sequence)
    plans = [world.step() for _ in range(3)]
    assert [parts(plan)[0].score_ids for plan in plans if plan] == [
        (),
        tuple(range(10, 18)),
        tuple(range(18, 21)),
    ]
    world.run()
    assert world.prompt_scores["r", 0] == list(range(2, 21))


def test_a_window_bounds_what_a_sequence_holds():
    window, chunk, size = 8, 16, 4
    world = World(make_config(windows=(window, window), max_batch_tokens=chunk, max_model_len=200))
    request = make_request(prompt=[i % 50 for i in range(120)], max_tokens=60)
    world.scheduler.add(request)
    decoding = []
    while world.step() is not None:
        kept = [sequence.table.kept.reshape(2, -1) for sequence in world.scheduler._running]
        assert all(lengths.shape == (2, 1) and lengths.max() <= window + chunk + size for lengths in kept)
        decoding += [lengths.max() for lengths in kept if world.tokens["r", 0]]
    assert max(decoding[1:]) <= window + size
    assert world.tokens["r", 0] == expected_output(request, 0, world.config)[0]


def test_dropped_pages_are_told_and_serve_others():
    world = World(make_config(windows=(None, 4), num_pages=40, max_batch_tokens=8))
    world.scheduler.add(make_request(prompt=range(1, 17), max_tokens=20))
    drops = []
    while (plan := world.step()) is not None:
        drops += [(drop.rows.tolist(), drop.pages) for drop in plan.drops]
    # Of 35 computed entries (8 full pages), all that the last growth at 32 could not see.
    assert {tuple(rows) for rows, _ in drops} == {(1,)}
    assert sum(pages for _, pages in drops) == (32 - 4 + 1) // 4


def test_a_sole_runner_in_the_smallest_pool_reaches_its_end():
    config = make_config(windows=(None, 6), num_pages=20, max_batch_tokens=5, max_model_len=200)
    world = World(config)
    request = make_request(prompt=range(1, 10), max_tokens=None)
    world.scheduler.add(request)
    world.run()
    assert world.tokens["r", 0] == expected_output(request, 0, config)[0]
    assert len(world.tokens["r", 0]) == config.max_length - 9


def test_heads_that_keep_different_lengths_grow_apart():
    world = World(make_config(windows=(None, 5), page_size=3, num_kv_heads=2, max_batch_tokens=7))
    world.scheduler.add(make_request(prompt=range(1, 30), max_tokens=20))
    for _ in range(12):
        world.step()
    (sequence,) = world.scheduler._running
    full, windowed = sequence.table.kept.reshape(2, -1)
    assert np.array_equal(full, [sequence.num_computed] * 2)
    assert windowed.max() < full.min()


def test_who_is_preempted_later_but_came_earlier_re_enters_first():
    world = World(make_config())
    crowd(world, 3)
    world.step()
    for sequence in reversed(world.scheduler._running[1:]):
        world.scheduler._preempt(sequence)
    assert [sequence.request.id for sequence in world.scheduler._waiting] == ["r1", "r2"]
    plan = world.step()
    assert plan is not None and [len(entry.prompt_ids) for entry in plan.assignments] == [6, 7]
    world.run()


def test_nobody_enters_in_a_step_that_preempts():
    world = World(make_config(num_pages=24))
    crowd(world, 5, max_tokens=25)
    preemptions = 0
    while (plan := world.step()) is not None:
        before, preemptions = preemptions, world.scheduler.stats().preemptions_total
        assert preemptions == before or not plan.assignments
    assert preemptions > 0


def test_pages_behind_the_window_go_in_the_step_after_a_chunk():
    world = World(make_config(windows=(4, 4)))
    world.scheduler.add(make_request(prompt=range(1, 19)))
    world.step()
    plan = world.step()
    # The query at 18 sees 15 to 18: pages 0 to 2 (entries 0 to 11) go, though the last page still has room.
    assert plan is not None and not len(plan.grants.pages)
    assert [(drop.rows.tolist(), drop.pages) for drop in plan.drops] == [([0, 1], 3)]
    world.run()


def begun_prompt_with_scores(num_pages: int) -> World:
    """`old` waits as if preempted after 7 scored tokens: it enters with a chunk of 7 of a step's 8 tokens."""
    world = World(make_config(page_size=1, num_pages=num_pages, max_batch_tokens=8, prefix_cache=False))
    world.scheduler.add(make_request("old", prompt=range(50), prompt_logprobs=0, max_tokens=1))
    next(iter(world.scheduler._waiting)).num_scored = 7
    return world


def test_admission_leaves_the_pages_that_a_begun_prompt_still_needs():
    # The whole prompt takes 100 pages, one token of the younger one 2, and 2 are the watermark.
    for num_pages, entering in ((103, 1), (104, 2)):
        world = begun_prompt_with_scores(num_pages)
        world.scheduler.add(make_request("young", prompt=(9,)))
        plan = world.step()
        assert plan is not None and len(plan.assignments) == entering
        world.run()
        assert world.prompt_scores["old", 0] == list(range(8, 50))


def test_who_is_already_in_the_step_is_not_preempted():
    world = begun_prompt_with_scores(num_pages=104)
    young = make_request("young", prompt=(9,), max_tokens=30)
    world.scheduler.add(young)
    world.run()
    # The younger one decodes first in each step, so the older one's next chunk cannot take its pages.
    assert world.sequences["young", 0].preemptions == 0
    assert world.sequences["old", 0].preemptions >= 1
    assert world.tokens["young", 0] == expected_output(young, 0, world.config)[0]
    assert world.prompt_scores["old", 0] == list(range(8, 50))


def test_a_begun_prompt_waits_while_an_older_one_takes_all_tokens():
    world = begun_prompt_with_scores(num_pages=200)
    world.scheduler.add(make_request("young", prompt=range(1, 20)))
    steps = [world.step() for _ in range(2)]
    assert [[len(part.token_ids) for part in parts(plan)] for plan in steps if plan] == [[7, 1], [8]]
    world.run()
    assert len(world.finished) == 2
