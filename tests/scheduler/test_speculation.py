"""Who drafts how much, what becomes of accepted tokens, and that drafts take nothing from anybody."""

from typing import Any

import msgspec
import numpy as np
import pytest

from quire.core.ids import RequestId
from quire.core.messages import Decoded, EngineStats, Failed, Finished, StepReport, Tokens, single_events
from quire.core.plan import BatchPlan, SequenceOutput, StepOutput
from quire.core.pruning import PolicyInfo, PruneParams
from quire.core.speculation import CaughtUp, DraftInfo
from quire.scheduler.scheduler import Scheduler

from .fake_engine import step_output
from .fake_text import expected_output
from .world import World, make_config, make_request, step

ALL = np.array([4], np.int32)
FIXED = DraftInfo(method="ngram", name="ngram", most=4, fixed=True)


def world_of(right: float = 1.0, looks_ahead: bool = False, **changes: Any) -> World:
    """Every draft is of four tokens, all right unless `right` says otherwise."""
    world = World(make_config(draft=FIXED, **changes), looks_ahead)
    world.engine.right = right
    return world


def drafts(plan: BatchPlan) -> list[int]:
    """Of the steady decodes, then of the others."""
    return [part.drafts for part in plan.parts()]


def decoding(**params: Any) -> tuple[Scheduler, BatchPlan]:
    """A scheduler with a sequence that has sampled the token 9; and the next plan."""
    scheduler = Scheduler(make_config(draft=FIXED))
    scheduler.add(make_request("a", max_tokens=12, **params))
    plan = scheduler.plan()
    assert plan is not None and drafts(plan) == [0], "a prompt does not draft"
    scheduler.commit(plan, StepOutput((SequenceOutput((9,)),), foreseen=ALL))
    plan = scheduler.plan()
    assert plan is not None
    return scheduler, plan


def commit(scheduler: Scheduler, plan: BatchPlan, *results: SequenceOutput) -> list[Any]:
    events = scheduler.commit(plan, step_output(plan, results, draft_seconds=0.5, foreseen=ALL))
    scheduler.check_integrity()
    return events


def test_a_decode_drafts_and_gets_what_was_right_and_one_more():
    scheduler, plan = decoding()
    assert drafts(plan) == [4] and not plan.sequences and plan.decodes.token_ids.tolist() == [9]
    (event,) = commit(scheduler, plan, SequenceOutput((5, 6, 7), drafted=4))
    assert event == Decoded([RequestId("a")], [0], [5, 6, 7], [3])
    assert [*single_events([event])] == [Tokens(RequestId("a"), 0, [5, 6, 7])]
    following = scheduler.plan()
    assert following is not None and following.decodes.starts.tolist() == [6]
    assert following.decodes.token_ids.tolist() == [7]
    counts = scheduler.stats().speculation
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (1, 4, 2)
    assert counts.accepted_per_position == [1, 1, 0, 0] and counts.lengths == [0, 0, 0, 0, 2]
    assert counts.draft_seconds == 0.5 and counts.step_seconds >= 0.0


def test_what_a_draft_model_took_from_its_cache_is_counted_and_kept_in_mind():
    scheduler = Scheduler(make_config(draft=msgspec.structs.replace(FIXED, method="model")))
    scheduler.add(make_request("a", max_tokens=12))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, StepOutput((SequenceOutput((9,)),), recalled=(3,)))
    plan = scheduler.plan()
    assert plan is not None and scheduler.speculation is not None
    results = [SequenceOutput((5,), drafted=4)]
    scheduler.commit(plan, step_output(plan, results, caught_up=CaughtUp(cached=3, computed=1)))
    counts = scheduler.stats().speculation
    assert (counts.cached_tokens, counts.computed_tokens) == (3, 1)
    assert scheduler.speculation.lengths.sources._recalled[plan.decodes.slots[0]] == 3


def test_a_tree_counts_its_nodes_as_drafted_and_its_depth_as_places():
    scheduler, plan = decoding()
    commit(scheduler, plan, SequenceOutput((5, 6, 7), drafted=4, branched=2))
    counts = scheduler.stats().speculation
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (1, 4, 2)
    assert counts.accepted_per_position == [1, 1, 0, 0]


def test_nothing_is_drafted_past_the_end():
    world = world_of()
    world.scheduler.add(request := make_request(max_tokens=8))
    plans = [step(world) for _ in range(3)]
    assert drafts(plans[1]) == [4] and not any(drafts(plans[2])[1:])
    world.run()
    assert world.tokens["r", 0] == expected_output(request, 0, world.config)[0]


def test_the_end_may_lie_inside_what_was_accepted():
    scheduler, plan = decoding(stop_token_ids=(6,))
    tokens, end = commit(scheduler, plan, SequenceOutput((5, 6, 7, 8), drafted=4))
    assert tokens == Tokens(RequestId("a"), 0, [5, 6])
    assert isinstance(end, Finished) and end.reason == "stop"
    assert not scheduler.has_work and scheduler.stats().generation_tokens_total == 3


def test_an_end_token_inside_counts_only_after_the_least_number_of_tokens():
    for least, said in ((4, [5, 6, 7]), (3, [5, 6, 7, 6])):
        scheduler, plan = decoding(stop_token_ids=(6,), min_tokens=least)
        events = [*single_events(commit(scheduler, plan, SequenceOutput((5, 6, 7, *said[3:]), drafted=4)))]
        assert isinstance(events[0], Tokens) and events[0].token_ids == said
        assert len(events) == len(said) - 2, "the last one ends it"


def test_of_a_batch_that_drafts_each_gets_its_own_and_who_ends_goes():
    """One gets several tokens, one ends, one fails, one was aborted meanwhile; who goes on stays in the columns."""
    scheduler = Scheduler(make_config(draft=FIXED))
    for name in "abcd":
        scheduler.add(make_request(name, max_tokens=12, stop_token_ids=(8,)))
    first = scheduler.plan()
    assert first is not None
    scheduler.commit(first, step_output(first, [SequenceOutput((9,))] * 4, foreseen=np.full(4, 4, np.int32)))
    plan = scheduler.plan()
    assert plan is not None and drafts(plan) == [4] * 4
    scheduler.abort(RequestId("d"))
    results = [((5, 6, 7), 4, None), ((5, 8, 6), 2, None), ((), 4, "no"), ((5, 5), 1, None)]
    outputs = [SequenceOutput(ids, drafted=drafted, error=error) for ids, drafted, error in results]
    several, *rest = commit(scheduler, plan, *outputs)
    assert several == Decoded([RequestId("a")], [0], [5, 6, 7], [3])
    assert [type(event) for event in rest] == [Tokens, Finished, Failed] and rest[0].token_ids == [5, 8]
    counts = scheduler.stats().speculation
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (3, 7, 5), "who failed tells nothing"
    plan = scheduler.plan()
    assert plan is not None and plan.decodes.token_ids.tolist() == [7] and not plan.sequences


def test_runs_cross_the_border_between_processes():
    events = [Decoded([RequestId("a"), RequestId("b")], [1, 0], [5, 6, 7], [2, 1])]
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(StepReport([*events], EngineStats())), type=StepReport)
    assert copy.events == events
    assert [*single_events(copy.events)] == [Tokens(RequestId("a"), 1, [5, 6]), Tokens(RequestId("b"), 0, [7])]


def test_an_abort_or_a_failure_while_drafts_are_verified():
    scheduler, plan = decoding()
    scheduler.abort(RequestId("a"))
    scheduler.check_integrity()
    assert commit(scheduler, plan, SequenceOutput((5, 6), drafted=4)) == [] and not scheduler.has_work
    scheduler, plan = decoding()
    (failed,) = commit(scheduler, plan, SequenceOutput(error="no"))
    assert isinstance(failed, Failed) and scheduler.stats().pages_used == 0


def test_who_does_not_want_drafts_stays_without_and_who_wants_log_probabilities_drafts():
    world = world_of()
    for request in (make_request("plain", speculate=False), make_request("scored", logprobs=0), make_request("usual")):
        world.scheduler.add(request)
    step(world)
    plan = step(world)
    assert len(plan.decodes) == 2 and len(plan.sequences) == 1
    assert drafts(plan) == [0, 2, 2], "all but the last of the three that are left"
    world.run()
    assert len(world.finished) == 3


def test_a_step_of_drafts_is_not_planned_ahead_and_one_without_is():
    world = world_of(looks_ahead=True)
    world.scheduler.add(make_request("a", max_tokens=20))
    world.run()
    assert world.planned_ahead == 0
    world.scheduler.add(make_request("b", max_tokens=20, speculate=False))
    world.run()
    assert world.planned_ahead > 10


def test_lengths_end_where_the_sequence_is_to_be_pruned():
    world = world_of(policies={"any": PolicyInfo()})
    prune = PruneParams(policy="any", keep=0.5, floor=1, window=1, sinks=0, every=7)
    world.scheduler.add(msgspec.structs.replace(make_request(prompt=range(1, 9), max_tokens=40), prune=prune))
    pruned_at = []
    while world.scheduler.has_work:
        plan = step(world)
        if plan.prunes and plan.sequences:
            assert drafts(plan) == [0]
            pruned_at.append(plan.sequences[0].start + len(plan.sequences[0].token_ids))
    assert pruned_at == [8, 15, 22, 29, 36, 43], "as without drafts"


@pytest.mark.parametrize("changes", [{}, {"windows": (None, 3)}])
def test_where_pages_are_short_drafts_are_shorter_and_nobody_goes(changes):
    def preemptions(draft: DraftInfo | None) -> tuple[int, int]:
        world = World(make_config(draft=draft, num_pages=24, **changes))
        world.engine.right = 0.0
        requests = [make_request(name, max_tokens=16, seed=ord(name)) for name in "ab"]
        for request in requests:
            world.scheduler.add(request)
        world.run()
        for request in requests:
            assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]
        return world.scheduler.stats().preemptions_total, world.engine.drafts

    assert preemptions(None)[0] == preemptions(FIXED)[0]
    assert preemptions(FIXED)[1] > 20


def test_pages_of_wrong_drafts_go_to_who_waits():
    """With one page fewer per head the second fits, of which the first still holds one for its draft."""
    world = world_of(right=0.0, num_pages=14, max_model_len=40)
    world.scheduler.add(make_request("a", prompt=range(1, 7), max_tokens=6))
    step(world)
    plan = step(world)
    assert drafts(plan) == [4] and world.scheduler.stats().pages_used == 6
    world.scheduler.add(make_request("b", prompt=range(20, 33), max_tokens=2))
    plan = step(world)
    assert world.scheduler.stats().running == 2 and world.scheduler.stats().pages_used == 4 + 8
    assert drafts(plan)[-1] == 0, "nothing was left to lend"
    world.run()


def test_blocks_are_published_with_the_tokens_that_were_accepted():
    world = world_of(right=0.7)
    world.scheduler.add(make_request("a", max_tokens=20))
    world.run()
    prompt = (5, 6, 7, *world.tokens["a", 0][:13])
    world.scheduler.add(request := make_request("b", prompt=prompt, max_tokens=6))
    assert step(world).assignments[0].cached == 12
    world.run()
    assert world.tokens["b", 0] == expected_output(request, 0, world.config)[0]


def test_members_of_a_batch_may_draft_beside_a_prompt():
    world = world_of(max_batch_tokens=16)
    world.scheduler.add(make_request("a", max_tokens=12))
    step(world)
    world.scheduler.add(make_request("b", prompt=range(1, 11)))
    plan = step(world)
    assert sorted(drafts(plan)) == [0, 4] and plan.num_tokens == 11
    assert np.sum(drafts(plan)) + plan.num_tokens <= 16
    world.run()


def test_prompts_and_the_steps_right_after_them_teach_no_costs():
    world = world_of(right=0.0)
    speculation, pure = world.scheduler.speculation, list[bool]()
    assert speculation is not None
    learn = speculation.lengths.learn

    def watched(*step: Any) -> None:
        pure.append(step[4])
        learn(*step)

    speculation.lengths.learn = watched  # type: ignore[method-assign, assignment]
    world.scheduler.add(make_request("a", max_tokens=16))
    for _ in range(6):
        step(world)
    assert pure == [False, False, False, True, True, True]


def test_steps_without_drafts_are_counted_though_nobody_looks_at_them():
    world = World(make_config(draft=DraftInfo(method="ngram", name="ngram", most=4)))
    speculation = world.scheduler.speculation
    assert speculation is not None
    speculation.lengths.on, speculation.lengths.idle = False, lambda decoding: True  # type: ignore[method-assign]
    for name, speculates in (("a", True), ("b", False)):
        world.scheduler.add(make_request(name, max_tokens=9, speculate=speculates))
    world.run()
    counts = world.scheduler.stats().speculation
    assert counts.lengths == [8, 0, 0, 0, 0]
