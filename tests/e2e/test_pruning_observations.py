"""What policies are shown is what the model really did: queries, attention mass, moments, repetition."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quire.kernels.paged_rows import PagedRows
from quire.pruning.attention import mean_attention
from quire.pruning.policy import LayerView

from .kept_oracle import Life, attended, hide, load_reference
from .test_pruning_matrix import INSTRUCTION, SHAPE, Serving, params, prompt, save

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 8
PROMPT = prompt(41)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rotary embedding also stretches (YaRN), so that turning back must undo that."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    return save(tmp_path_factory.mktemp("yarn"), rope_parameters=yarn)


class Shown(Serving):
    """Keeps the views of every choice."""

    def __init__(self, model: Path, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.views: list[list[LayerView]] = []
        pruner: Any = self.recorder._engine._pruner
        views_of = pruner._views

        def show(slot: int) -> list[LayerView]:
            # What the pages hold now: later they hold something else.
            self.views.append([])
            for view in views_of(slot):
                keys, positions = PagedRows.of(view.keys), PagedRows.of(view.positions)
                self.views[-1].append(replace(view, stored_keys=keys, stored_positions=positions))
            return self.views[-1]

        pruner._views = show


@torch.inference_mode()
def reference_pass(serving: Serving, ids: list[int], life: Life | None = None) -> dict[int, Tensor]:
    """Fills `attended`; returns per layer the queries before rotation, [T, H, D]."""
    reference = load_reference(serving.model)
    hide(life or serving.recorder.lives["a", 0][0], reference.config, len(ids))
    queries: dict[int, Tensor] = {}
    for number, layer in enumerate(reference.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _m, _i, out, number=number: queries.update({number: out[0].view(-1, HEADS, WIDTH)})
        )
    reference(input_ids=torch.tensor([ids]), use_cache=False)
    return queries


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_mass_is_what_all_queries_gave_also_after_entries_were_dropped(model: Path, runner: str) -> None:
    serving = Shown(model, runner=runner)
    serving.submit("a", PROMPT, params("h2o", budget="ada"), max_tokens=14)
    serving.run()
    assert len(serving.views) >= 4
    reference_pass(serving, [*PROMPT, *serving.tokens["a", 0]])
    for views in serving.views:
        for view in views:
            n, weights = (
                view.num_tokens,
                attended[view.layer].view(KV_HEADS, HEADS // KV_HEADS, *[len(attended[0][0])] * 2),
            )
            assert view.mass is not None and view.seen is not None
            columns = weights[:, :, :n].sum((1, 2)).gather(1, view.positions.long())
            torch.testing.assert_close(view.mass[view.valid], columns[view.valid], atol=1e-4, rtol=1e-4)
            assert torch.equal(view.seen[view.valid], (n - view.positions)[view.valid].float())


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize("budget", [7, 64])
def test_moments_are_of_queries_before_rotation(model: Path, runner: str, budget: int) -> None:
    serving = Shown(model, runner=runner, max_batch_tokens=budget)
    serving.submit("a", PROMPT, params("expected", chunked=False, every=0))
    serving.run()
    (views,) = serving.views
    queries = reference_pass(serving, PROMPT)
    for view in views:
        rows = queries[view.layer][2:]  # without the sinks'
        assert view.query_mean is not None and view.query_covariance is not None and view.rotation is not None
        torch.testing.assert_close(view.query_mean, rows.mean(0), atol=1e-4, rtol=1e-4)
        for head in range(HEADS):
            covariance = torch.cov(rows[:, head].T, correction=0)
            torch.testing.assert_close(view.query_covariance[head], covariance, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("budget", [3, 64])
def test_the_newest_queries_give_the_attention_of_the_last_rows(model: Path, budget: int) -> None:
    serving = Shown(model, max_batch_tokens=budget, max_num_seqs=2)
    serving.submit("a", PROMPT, params("snapkv", chunked=False, every=6), max_tokens=9)
    serving.run()
    assert len(serving.views) == 2
    reference_pass(serving, [*PROMPT, *serving.tokens["a", 0]])
    for views in serving.views:
        for view in views:
            assert view.queries is not None and view.query_positions is not None
            assert view.query_positions.tolist() == list(range(view.num_tokens - 5, view.num_tokens))
            keys = view.keys.repeat_interleave(HEADS // KV_HEADS, 0)
            scores = torch.einsum("whd,hed->hwe", view.queries, keys) * view.scale
            later = view.positions.repeat_interleave(HEADS // KV_HEADS, 0)[:, None] > view.query_positions[:, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            index = view.positions.repeat_interleave(HEADS // KV_HEADS, 0).long()[:, None].expand_as(weights)
            expected = attended[view.layer][:, view.query_positions].gather(2, index)
            torch.testing.assert_close(weights, expected, atol=1e-4, rtol=1e-4)


def test_repetition_is_the_greatest_attention_to_each_entry(model: Path) -> None:
    serving = Shown(model, max_batch_tokens=64)
    serving.submit("a", PROMPT, params("kvzip"))
    serving.run()
    (views,) = serving.views
    reference_pass(serving, [*PROMPT, *INSTRUCTION, *PROMPT], Life(0))  # nothing is forgotten before
    for view in views:
        n = len(PROMPT)
        weights = attended[view.layer].view(KV_HEADS, HEADS // KV_HEADS, *attended[view.layer].shape[1:])
        assert view.repeated is not None and view.repeated.shape == (KV_HEADS, n)
        torch.testing.assert_close(view.repeated, weights[:, :, n:, :n].amax((1, 2)), atol=1e-4, rtol=1e-4)


def test_a_models_sinks_take_their_part_of_what_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = SHAPE | {"num_hidden_layers": 2, "head_dim": WIDTH, "num_local_experts": 4, "sliding_window": 8}
    gpt_oss = transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape))
    for layer in gpt_oss.model.layers:
        torch.nn.init.uniform_(layer.self_attn.sinks, 2.0, 4.0)
    gpt_oss.save_pretrained(tmp_path)
    serving = Shown(tmp_path, max_batch_tokens=64)
    serving.submit("a", PROMPT, params("snapkv", chunked=False, every=0))
    serving.run()
    serving.check()
    (views,) = serving.views
    (view,) = views  # the other layer has a window
    reference_pass(serving, PROMPT, Life(0))
    expected = attended[view.layer][:, -5:].view(KV_HEADS, -1, 5, len(PROMPT))
    assert expected.sum(-1).mean() < 0.8
    torch.testing.assert_close(mean_attention(view, 5), expected.mean((1, 2)), atol=1e-4, rtol=1e-4)
