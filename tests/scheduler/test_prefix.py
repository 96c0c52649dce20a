"""Who begins with whose blocks, who waits for them, and what becomes of them when pages run short."""

from quire.core.ids import RequestId
from quire.core.messages import Tokens, single_events
from quire.core.plan import BatchPlan
from quire.core.request import Request

from .fake_engine import parts
from .fake_text import expected_output
from .world import World, make_config, make_request

PROMPT = range(1, 19)
"""Four pages of 4 and two tokens."""


def entered(plan: BatchPlan | None) -> list[int]:
    """Entries that each assigned slot begins with."""
    assert plan is not None
    return [assignment.cached for assignment in plan.assignments]


def run(world: World, request: Request, index: int = 0) -> int:
    """Serve one request, check its text; returns how many of its prompt tokens were cached."""
    world.scheduler.add(request)
    world.run()
    assert world.tokens[request.id, index] == expected_output(request, index, world.config)[0]
    return world.sequences[request.id, index].cached_tokens


def test_full_blocks_of_an_earlier_prompt_are_not_computed_again():
    world = World(make_config())
    assert run(world, make_request("a", PROMPT)) == 0
    world.scheduler.add(make_request("b", PROMPT))
    plan = world.step()
    assert plan is not None and entered(plan) == [16]
    assert (parts(plan)[0].start, parts(plan)[0].token_ids) == (16, (17, 18))
    assert len(plan.shares.pages) == 4 * 2 and len(plan.grants.pages) == 2
    world.run()
    assert world.tokens["b", 0] == world.tokens["a", 0]
    stats = world.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total, stats.prompt_tokens_total) == (36, 16, 20)


def test_the_last_known_token_is_always_computed():
    world = World(make_config())
    run(world, make_request("a", range(1, 17)))
    assert run(world, make_request("b", range(1, 17))) == 12
    assert run(world, make_request("c", range(1, 18))) == 16


def test_only_what_was_computed_is_reused_output_included():
    world = World(make_config())
    run(world, make_request("a", PROMPT, max_tokens=7))
    text = (*PROMPT, *world.tokens["a", 0])
    # 25 tokens are known, the last of them was never computed: 24 make 6 blocks.
    assert run(world, make_request("b", (*text, 3, 3), seed=8)) == 24
    assert run(world, make_request("c", (*PROMPT, 49, *text[19:]), seed=8)) == 16


def test_a_running_sequence_shares_its_blocks_and_outlives_nobody():
    world = World(make_config())
    world.scheduler.add(make_request("a", PROMPT, max_tokens=3))
    world.step()
    world.scheduler.add(make_request("b", PROMPT, seed=2, max_tokens=20))
    plan = world.step()
    assert entered(plan) == [16]
    assert world.scheduler.stats().pages_used == 4 * 2 + 2 * 2, "shared pages count once"
    while ("a", 0) not in world.finished:
        world.step()
    assert world.scheduler.stats().pages_cached == 2, "the block of its own that it left is not shared"
    world.run()
    assert world.tokens["b", 0] == expected_output(make_request("b", PROMPT, seed=2, max_tokens=20), 0, world.config)[0]


def test_salts_share_nothing():
    world = World(make_config())

    def salted(name: str, salt: str) -> Request:
        plain = make_request(name, PROMPT)
        return Request(id=plain.id, prompt_ids=plain.prompt_ids, params=plain.params, seed=1, cache_salt=salt)

    hits = [run(world, salted(str(number), salt)) for number, salt in enumerate(["", "a", "b", "a", ""])]
    assert hits == [0, 0, 0, 16, 16]


def test_sequences_whose_keys_rotate_by_their_length_share_only_with_their_like():
    world = World(make_config(rope_length=30))
    lengths = (5, 12, 20, 30, 20)
    hits = [run(world, make_request(str(number), PROMPT, max_tokens=n)) for number, n in enumerate(lengths)]
    assert hits == [0, 16, 0, 0, 16]


def test_switched_off_nothing_is_kept():
    world = World(make_config(prefix_cache=False))
    assert [run(world, make_request(name, PROMPT)) for name in "ab"] == [0, 0]
    stats = world.scheduler.stats()
    assert stats.pages_cached == stats.prefix_queries_total == 0


def test_models_with_windows_keep_nothing():
    world = World(make_config(windows=(None, 5)))
    assert [run(world, make_request(name, PROMPT)) for name in "ab"] == [0, 0]
    assert world.scheduler.stats().pages_cached == world.scheduler.stats().prefix_queries_total == 0


def test_scored_prompts_are_computed_but_serve_others():
    world = World(make_config())
    run(world, make_request("a", PROMPT))
    assert run(world, make_request("scored", (*PROMPT, 8, 8, 8), prompt_logprobs=0)) == 0
    assert world.prompt_scores["scored", 0] == [*PROMPT, 8, 8, 8][1:]
    assert run(world, make_request("b", (*PROMPT, 8, 8, 8))) == 20
    assert world.scheduler.stats().prefix_queries_total == 18 + 21


def test_a_scored_prompt_reuses_what_it_has_delivered_scores_for():
    world = World(make_config(max_batch_tokens=6))
    world.scheduler.add(make_request("r", PROMPT, prompt_logprobs=0))
    world.step()
    (sequence,) = world.scheduler._running
    world.scheduler._preempt(sequence)
    plans = [world.step() for _ in range(3)]
    # 6 scores were delivered and one block is full: the rows 4 and 5 are computed again, then come new scores.
    assert entered(plans[0]) == [4]
    assert [parts(plan)[0].score_ids for plan in plans if plan] == [
        (),
        tuple(range(8, 14)),
        tuple(range(14, 19)),
    ]
    world.run()
    assert world.prompt_scores["r", 0] == world.engine.scored == list(range(2, 19))


def test_choices_of_a_request_compute_their_prompt_once():
    world = World(make_config(max_batch_tokens=10))
    request = make_request("r", PROMPT, n=3)
    world.scheduler.add(request)
    assert [entered(world.step()) for _ in range(3)] == [[0], [], [16, 16]]
    world.run()
    for index in range(3):
        assert world.tokens["r", index] == expected_output(request, index, world.config)[0]
    assert [world.sequences["r", index].cached_tokens for index in range(3)] == [0, 16, 16]
    assert world.scheduler.stats().prompt_tokens_total == 18 + 2 * 2


def test_who_waits_for_a_prefix_lets_others_pass_and_is_next():
    world = World(make_config(max_batch_tokens=10, max_num_seqs=3))
    world.scheduler.add(make_request("a", PROMPT))
    world.step()
    world.scheduler.add(make_request("b", [*PROMPT, 30]))
    world.scheduler.add(make_request("other", [40]))
    world.scheduler.add(make_request("late", [41]))
    plan = world.step()
    assert plan is not None
    prompts = [assignment.prompt_ids for assignment in plan.assignments]
    # The first step computed 10 tokens of `a`, the second computes the rest: `b` misses its third block until then.
    assert prompts == [(40,), (41,)]
    while world.scheduler.stats().waiting:
        plan = world.step()
    assert entered(plan) == [16]
    world.run()
    assert len(world.finished) == 4


def test_nobody_waits_for_what_only_begins_alike():
    world = World(make_config(max_batch_tokens=8))
    world.scheduler.add(make_request("a", range(1, 31)))
    assert entered(world.step()) == [0]
    world.scheduler.add(make_request("b", [*range(1, 9), 40, 41, 42]))
    assert entered(world.step()) == []  # `a` takes all tokens of the step
    for _ in range(2):
        plan = world.step()
        if plan is not None and plan.assignments:
            break
    assert entered(plan) == [8]
    assert world.scheduler._running[0].num_pending > 0
    world.run()


def test_waiting_ends_with_who_was_waited_for():
    for end in ("abort", "preempt"):
        world = World(make_config(max_batch_tokens=8))
        world.scheduler.add(make_request("a", range(1, 31)))
        world.step()
        world.scheduler.add(make_request("b", range(1, 31)))
        world.step()
        if end == "abort":
            world.scheduler.abort(RequestId("a"))
        else:
            world.scheduler._preempt(world.scheduler._running[0])
        assert entered(world.step()) == [16]
        world.run()
        assert world.tokens["b", 0] == expected_output(make_request("b", range(1, 31)), 0, world.config)[0]


def test_kept_prefixes_leave_before_anybody_is_preempted():
    world = World(make_config(num_pages=40))
    for number in range(6):
        run(world, make_request(str(number), range(number * 8, number * 8 + 8), max_tokens=5))
    assert world.scheduler.stats().pages_cached > 30
    big = make_request("big", range(10, 45), max_tokens=29, seed=3)
    assert run(world, big) == 0
    assert world.scheduler.stats().preemptions_total == 0


def test_kept_prefixes_do_not_stand_in_the_way_of_admission():
    world = World(make_config(num_pages=40, max_num_seqs=4))
    for number in range(4):
        run(world, make_request(str(number), range(number * 10, number * 10 + 10), max_tokens=7))
    assert world.scheduler.stats().pages_cached == 32
    for number in range(3):
        world.scheduler.add(make_request(f"new{number}", [45 + number] * 16, max_tokens=1))
    # Each takes 8 pages and 2 are the watermark: all fit at once, though only 8 are free.
    plan = world.step()
    assert plan is not None and len(plan.assignments) == 2, "32 tokens are two prompts"
    assert len((world.step() or plan).assignments) == 1
    world.run()


def test_shared_pages_are_not_asked_for_twice():
    world = World(make_config(num_pages=26, max_batch_tokens=64))
    world.scheduler.add(make_request("a", PROMPT, max_tokens=10))
    world.step()
    # 10 pages are in use, 16 free. Three times 10 more would not fit, but only 2 of each 10 are new.
    for name in "bcd":
        world.scheduler.add(make_request(name, PROMPT, seed=ord(name), max_tokens=3))
    assert entered(world.step()) == [16, 16, 16]
    world.run()
    assert world.scheduler.stats().preemptions_total == 0


def test_a_preempted_sequence_begins_with_its_own_blocks():
    world = World(make_config())
    request = make_request("r", PROMPT, max_tokens=12)
    world.scheduler.add(request)
    for _ in range(8):
        world.step()
    (sequence,) = world.scheduler._running
    world.scheduler._preempt(sequence)
    assert entered(world.step()) == [24]
    world.run()
    assert (sequence.cached_tokens, sequence.preemptions) == (0, 1), "its own blocks are no prompt tokens saved"
    assert world.tokens["r", 0] == expected_output(request, 0, world.config)[0]
    assert world.scheduler.stats().prefix_hits_total == 0


def test_who_computes_a_known_block_again_keeps_the_copy_and_goes_on_publishing():
    world = World(make_config())
    run(world, make_request("a", range(1, 17), max_tokens=1))
    again = make_request("b", range(1, 17), seed=9, max_tokens=6)
    assert run(world, again) == 12
    text = (*again.prompt_ids, *world.tokens["b", 0])
    assert run(world, make_request("c", (*text, 1), seed=5)) == 20
    assert world.scheduler.stats().pages_cached == 2 * (4 + 1 + 1), "one copy of each block is kept"


def test_a_failed_sequence_takes_its_blocks_with_it():
    world = World(make_config(max_batch_tokens=8))
    run(world, make_request("before", range(1, 9)))
    world.engine.failing_seeds.add(13)
    world.scheduler.add(make_request("bad", PROMPT, seed=13))
    world.scheduler.add(make_request("beside", range(1, 12), seed=2))
    world.run()
    assert "bad" in world.failed and ("beside", 0) in world.finished
    # What `bad` began with and what it computed may be what was wrong.
    assert run(world, make_request("after", PROMPT)) == 0
    assert run(world, make_request("later", PROMPT)) == 16


def test_an_aborted_prompt_leaves_what_it_had_computed():
    world = World(make_config(max_batch_tokens=8))
    world.scheduler.add(make_request("gone", PROMPT))
    world.step()
    world.step(between=lambda: world.scheduler.abort(RequestId("gone")))
    world.run()
    # The second step's result was never committed: its blocks are not known to be right.
    assert run(world, make_request("next", PROMPT)) == 8


def test_cached_tokens_come_with_the_first_token():
    world = World(make_config())
    run(world, make_request("a", PROMPT))
    world.scheduler.add(make_request("b", PROMPT, max_tokens=3))
    counts = []
    while (plan := world.scheduler.plan()) is not None:
        events = single_events(world.scheduler.commit(plan, world.engine.step(plan)))
        counts += [event.cached_tokens for event in events if isinstance(event, Tokens)]
    assert counts == [16, 0, 0]


def test_without_prefix_cache_choices_still_compute_their_prompt_once():
    world = World(make_config(max_batch_tokens=10, prefix_cache=False))
    request = make_request("r", PROMPT, n=3)
    world.scheduler.add(request)
    assert [entered(world.step()) for _ in range(3)] == [[0], [], [16, 16]]
    world.run()
    for index in range(3):
        assert world.tokens["r", index] == expected_output(request, index, world.config)[0]
    stats = world.scheduler.stats()
    assert stats.pages_cached == stats.prefix_queries_total == 0
    assert run(world, make_request("again", PROMPT, n=2)) == 0
