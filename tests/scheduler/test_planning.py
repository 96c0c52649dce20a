"""Who is in a batch, with how many tokens and which pages."""

from quire.core.plan import BatchPlan
from quire.scheduler.sequence import MAX_SCORED_ROWS, choice_seed

from .fake_engine import parts
from .fake_text import expected_output
from .world import EOS, World, make_config, make_request


def shape(plan: BatchPlan | None) -> list[tuple[int, int, bool]]:
    """(start, tokens, sample) of each sequence."""
    assert plan is not None
    return [(part.start, len(part.token_ids), part.sample) for part in parts(plan)]


def test_no_work_no_plan():
    world = World(make_config())
    assert not world.scheduler.has_work
    assert world.scheduler.plan() is None


def test_a_prompt_is_computed_in_chunks_and_then_decoded():
    world = World(make_config(max_batch_tokens=8))
    world.scheduler.add(make_request(prompt=range(1, 21), max_tokens=3))
    assert shape(world.step()) == [(0, 8, False)]
    assert shape(world.step()) == [(8, 8, False)]
    assert shape(world.step()) == [(16, 4, True)]
    assert shape(world.step()) == [(20, 1, True)]
    assert shape(world.step()) == [(21, 1, True)]
    assert world.step() is None
    assert len(world.tokens["r", 0]) == 3


def test_decodes_come_before_begun_prompts_before_new_ones():
    world = World(make_config(max_batch_tokens=8))
    world.scheduler.add(make_request("a", prompt=range(1, 4), max_tokens=9))
    assert shape(world.step()) == [(0, 3, True)]
    world.scheduler.add(make_request("b", prompt=range(1, 12)))
    world.scheduler.add(make_request("c", prompt=range(1, 3)))
    assert shape(world.step()) == [(3, 1, True), (0, 7, False)]
    assert shape(world.step()) == [(4, 1, True), (7, 4, True), (0, 2, True)]
    assert shape(world.step()) == [(5, 1, True), (11, 1, True), (2, 1, True)]


def test_more_runners_than_tokens_still_all_end():
    world = World(make_config(max_batch_tokens=2))
    for name in "abcd":
        world.scheduler.add(make_request(name, prompt=(7,)))
    world.run()
    assert len(world.finished) == 4


def test_slots_limit_who_runs():
    world = World(make_config(max_num_seqs=2))
    for name in "abc":
        world.scheduler.add(make_request(name))
    plan = world.step()
    assert plan is not None and sorted(part.slot for part in parts(plan)) == [0, 1]
    assert (world.scheduler.stats().running, world.scheduler.stats().waiting) == (2, 1)
    world.run()
    assert len(world.finished) == 3


def test_grants_come_only_when_a_page_is_full():
    world = World(make_config())
    world.scheduler.add(make_request(prompt=range(1, 7), max_tokens=6))
    granted = []
    while (plan := world.step()) is not None:
        granted.append(len(plan.grants.pages))
    # Positions 0 to 5 take two pages of 4 for each of the 2 heads; 6 and 7 fit; 8 needs new ones; 9 and 10 fit.
    assert granted == [4, 0, 0, 2, 0, 0]


def test_the_head_of_the_queue_is_not_overtaken():
    world = World(make_config(num_pages=24))
    world.scheduler.add(make_request("a", prompt=range(1, 13), max_tokens=8))
    world.step()
    world.scheduler.add(make_request("long", prompt=range(5, 45), max_tokens=1))
    world.scheduler.add(make_request("short", prompt=(1,), max_tokens=1))
    plan = world.step()
    assert plan is not None and not plan.assignments
    world.run()
    assert list(world.finished) == [("a", 0), ("long", 0), ("short", 0)]


def test_admission_leaves_a_page_per_head_for_runners():
    world = World(make_config(num_pages=10))
    world.scheduler.add(make_request("a", prompt=range(1, 9), max_tokens=2))
    world.step()
    # 4 pages are taken. 5 to 8 tokens take 4 more and would leave 2: the watermark. 9 tokens take 6.
    world.scheduler.add(make_request("b", prompt=range(11, 20), max_tokens=2))
    plan = world.step()
    assert plan is not None and not plan.assignments
    world.run()
    assert world.scheduler.stats().preemptions_total == 0


def test_choices_have_their_own_seeds_and_the_first_is_the_plain_request():
    world = World(make_config())
    request = make_request(n=3, seed=99)
    world.scheduler.add(request)
    plan = world.step()
    assert plan is not None
    seeds = [assignment.seed for assignment in plan.assignments]
    assert seeds[0] == 99 and len(set(seeds)) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)
    world.run()
    for index in range(3):
        assert world.tokens["r", index] == expected_output(request, index, world.config)[0]


def test_choice_seeds_stay_in_64_bits_and_differ():
    seeds = {choice_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(128)}
    assert len(seeds) == 3 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_an_assignment_says_what_the_engine_must_know():
    world = World(make_config())
    request = make_request(ignore_eos=False, stop_token_ids=(9, EOS), max_tokens=7)
    world.scheduler.add(request)
    plan = world.step()
    assert plan is not None
    (assignment,) = plan.assignments
    assert assignment.params is request.params
    assert assignment.stop_ids == (EOS, 9)
    assert assignment.prompt_ids == request.prompt_ids
    assert (assignment.output_ids, assignment.max_length) == ((), 10)


def test_prompt_scores_cover_each_token_but_the_first():
    world = World(make_config(max_batch_tokens=4))
    world.scheduler.add(make_request(prompt=range(1, 11), prompt_logprobs=0, max_tokens=2))
    plans = [world.step() for _ in range(4)]
    assert [parts(plan)[0].score_ids for plan in plans if plan] == [(2, 3, 4, 5), (6, 7, 8, 9), (10,), ()]
    world.run()
    assert world.prompt_scores["r", 0] == list(range(2, 11))


def test_stats_count_rows_and_tokens():
    world = World(make_config(max_batch_tokens=8))
    world.scheduler.add(make_request(prompt=range(1, 11), max_tokens=2))
    world.step()
    stats = world.scheduler.stats()
    assert (stats.steps_total, stats.batch_tokens, stats.prompt_tokens_total) == (1, 8, 8)
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages_total) == (1, 0, 4, 100)
    world.run()
    stats = world.scheduler.stats()
    assert (stats.steps_total, stats.batch_tokens) == (3, 1)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (10, 2)
    assert (stats.running, stats.pages_used) == (0, 0)


def test_scored_chunks_are_short():
    world = World(make_config(max_batch_tokens=1024, max_model_len=1024, num_pages=1024))
    world.scheduler.add(make_request(prompt=[7] * (MAX_SCORED_ROWS + 9), prompt_logprobs=0))
    assert shape(world.step()) == [(0, MAX_SCORED_ROWS, False)]
    assert shape(world.step()) == [(MAX_SCORED_ROWS, 9, True)]
    assert len(world.prompt_scores["r", 0]) == MAX_SCORED_ROWS + 8
