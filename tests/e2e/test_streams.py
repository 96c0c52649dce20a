"""Texts that outgrow the model's context: positions that close up as a sequence forgets (StreamingLLM)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface

from quire.core.config import EngineConfig
from quire.core.errors import ContextLengthError, InvalidRequestError
from quire.core.ids import RequestId
from quire.core.messages import Failed, Tokens, single_events
from quire.core.pruning import PruneParams
from quire.core.request import Request, SamplingParams
from quire.engine.graphs import DecodeGraphs
from quire.scheduler import scheduler as some_code
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop
from quire.server.llm import LLM

from .kept_oracle import Life, Recorder

VOCAB, CONTEXT = 97, 48
PROMPT = [3 + (7 * i * i + 3 * i) % 90 for i in range(30)]
LONG = [3 + (5 * i * i + i) % 90 for i in range(3 * CONTEXT)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(11)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 100.0,
    }
    config = transformers.LlamaConfig(**shape, **heads, initializer_range=0.3, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(model: Path, **settings: Any) -> EngineLoop:
    options: dict[str, Any] = {"page_size": 4, "max_num_seqs": 4, "max_batch_tokens": 24, "max_stream_len": 400}
    options["draft"] = "none"
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", **options | settings)
    return load_in_process(config)


def stream(**changes: Any) -> PruneParams:
    """Keeps 14 entries of however many."""
    values: dict[str, Any] = {"keep": 0.01, "floor": 14, "window": 5, "sinks": 2, "every": 6, "positions": "cache"}
    return PruneParams(policy="window", **values | changes)


def request(name: str, prompt: list[int], prune: PruneParams | None, **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, "logprobs": 0} | params
    return Request(id=RequestId(name), prompt_ids=tuple(prompt), params=SamplingParams(**settings), seed=5, prune=prune)


def run(loop: EngineLoop, *requests: Request) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities; pages must add up after every step."""
    said: dict[str, tuple[list[int], list[float]]] = {one.id: ([], []) for one in requests}
    for one in requests:
        loop.submit(one)
    while loop.has_work:
        for event in single_events(loop.step().events):
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens):
                said[event.request_id][0].extend(event.token_ids)
                said[event.request_id][1].extend(entry.logprob for entry in event.logprobs or ())
        loop.scheduler.check_integrity()
    assert loop.scheduler.stats().pages_used == 0
    return said


_hidden = torch.zeros(0, 0, dtype=torch.bool)
"""[T, T]: query, entry that it no longer sees."""


def _closed_up_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **_: Any) -> Any:
    """Unrotated query and key: each pair is rotated by the places that both have among what the query sees."""
    size, half = query.shape[2], query.shape[3] // 2
    seen = torch.ones(size, size, dtype=torch.bool).tril() & ~_hidden
    place = seen.cumsum(1) - 1
    distance = (place.diagonal()[:, None] - place).double()
    frequencies = 1 / 100.0 ** (torch.arange(half).double() / half)
    turns = torch.polar(torch.ones(()).double(), distance[..., None] * frequencies)  # [T, T, D / 2]
    query, key = (torch.complex(x[0, ..., :half].double(), x[0, ..., half:].double()) for x in (query, key))
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = torch.einsum("hqd,hed,qed->hqe", query, key.conj(), turns).real * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).float()
    return (weights @ value[0].repeat_interleave(len(query) // len(value[0]), 0)).transpose(0, 1)[None], None


@torch.inference_mode()
def expected(model: Path, lives: list[Life], prompt: list[int], output: list[int]) -> list[float]:
    """Log-probabilities of the output by the library's model with contiguous positions, all computed anew."""
    global _hidden
    AttentionInterface.register("closed-up", _closed_up_attention)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="closed-up").eval()
    ids = torch.tensor([[*prompt, *output[:-1]]])
    (life,) = lives
    _hidden = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    for (layer, head, position), first in life.forgotten.items():
        _hidden[first:, position] = True
        assert life.forgotten[0, 0, position] == first, (layer, head)
    # At position 0 nothing is rotated.
    logits = reference(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits[0].float()
    rows = logits[len(prompt) - 1 :].log_softmax(-1)
    return rows.gather(1, torch.tensor(output)[:, None])[:, 0].tolist()


def test_a_stream_far_past_the_context_says_what_contiguous_positions_say(model: Path) -> None:
    """Short and long prompt, sampled and greedy, side by side; the tokens before the first prune are plain ones."""
    loop = load(model)
    recorder = Recorder(loop)
    asked = [
        request("short", PROMPT, stream(), max_tokens=5 * CONTEXT),
        request("long", LONG, stream(floor=20), max_tokens=2 * CONTEXT, temperature=0.8),
        request("plain", PROMPT[:9], None),
    ]
    said = run(loop, *asked)
    assert recorder.compactions > 40
    for one in asked:
        (tokens, logprobs), prompt = said[one.id], list(one.prompt_ids)
        assert len(tokens) == one.params.max_tokens
        lives = recorder.lives[one.id, 0]
        assert logprobs == pytest.approx(expected(model, lives, prompt, tokens), abs=2e-3)
    assert max(position for *_, position in recorder.lives["short", 0][0].forgotten) > 4 * CONTEXT


def test_positions_of_the_text_say_something_else(model: Path) -> None:
    """So that the test above cannot pass by chance: what is forgotten is the same, what is said is not."""
    loop = load(model)
    recorder = Recorder(loop)
    kept = request("text", PROMPT, stream(positions="text"), max_tokens=CONTEXT - len(PROMPT))
    tokens, logprobs = run(loop, kept)["text"]
    other = expected(model, recorder.lives["text", 0], PROMPT, tokens)
    assert recorder.compactions and max(abs(a - b) for a, b in zip(logprobs, other, strict=True)) > 0.05


def test_one_that_was_swapped_out_goes_on_as_it_was(model: Path) -> None:
    loop = load(model, swap_memory=2**20, kv_memory=72 * (2 * 4 * 8 * 4 + 16))
    recorder = Recorder(loop)
    asked = [request(str(n), PROMPT[n : n + 9], stream(), max_tokens=2 * CONTEXT) for n in range(4)]
    said = run(loop, *asked)
    assert loop.scheduler.stats().swap_out_sequences_total > 0
    for one in asked:
        tokens, logprobs = said[one.id]
        own = expected(model, recorder.lives[one.id, 0], list(one.prompt_ids), tokens)
        assert logprobs == pytest.approx(own, abs=2e-3)


def test_log_loss_on_code_stays_what_it_was_inside_the_context() -> None:
    """The embedded model reads 1536 tokens with a context of 256; the control has all of them in its context."""
    shape: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 1}
    llm = LLM(**shape, max_batch_tokens=64, max_model_len=256, max_stream_len=1600)
    whole = LLM(**shape, max_batch_tokens=256)
    ids = llm.tokenizer.encode(Path(some_code.__file__).read_text())[:1536]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    losses = []
    for served, prune in ((llm, stream(floor=160, every=16)), (whole, None)):
        (done,) = served.generate([ids], params, prune=prune, progress=False)
        losses.append(torch.tensor([-entry.logprob for entry in done.prompt_logprobs]))
    ours, control = losses
    assert torch.allclose(ours[:63], control[:63], atol=1e-3)
    assert ours[512:].mean() < 1.15 * control[512:].mean() < 8


@pytest.mark.parametrize(
    "changes",
    [
        {"draft": "ngram", "draft_tokens": 3},
        {"draft": "layerskip:2", "draft_tokens": 3},
        {"prefix_cache": False},
        {"attention_backend": "reference"},
    ],
    ids=str,
)
def test_drafts_prefixes_and_backends_change_nothing(model: Path, changes: dict[str, Any]) -> None:
    asked = [
        request(name, PROMPT + [9] * turn, stream(), max_tokens=2 * CONTEXT)
        for turn, name in enumerate(("a", "b", "c"))
    ]
    plain, loop = load(model), load(model, **changes)
    once, again = run(plain, *asked), run(loop, *asked)
    stats = loop.scheduler.stats()
    for name, (tokens, logprobs) in once.items():
        assert again[name][0] == tokens
        assert again[name][1] == pytest.approx(logprobs, abs=2e-3)
    assert (stats.speculation.accepted_tokens > 0) == ("draft" in changes)


def test_decode_graphs_say_the_same(model: Path) -> None:
    asked = [request(str(n), PROMPT[n:], stream() if n else None, max_tokens=80 if n else 17) for n in range(3)]
    plain, loop = load(model), load(model)
    engine: Any = loop.engine
    replays = list[int]()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            replays.append(1)
            work()

        work()
        return replay

    engine._graphs = DecodeGraphs(engine._runner, engine.cache, 4, "reference", capture)
    once, again = run(plain, *asked), run(loop, *asked)
    assert len(replays) > 50
    for name, (tokens, logprobs) in once.items():
        assert again[name] == (tokens, pytest.approx(logprobs, abs=2e-3))


def test_begins_with_the_exact_blocks_of_others_and_leaves_only_exact_ones(model: Path) -> None:
    loop = load(model, max_batch_tokens=64)
    first = run(loop, request("a", PROMPT, None))["a"]
    run(loop, request("b", PROMPT, stream(chunked=False), max_tokens=CONTEXT - len(PROMPT)))
    assert loop.scheduler.stats().prefix_hits_total > 0 and loop.scheduler.stats().prunes["window"].entries > 0
    assert run(loop, request("c", PROMPT, None))["c"] == first


def test_what_cannot_close_up_is_refused_by_name(model: Path) -> None:
    for changes in ({"budget": "ada"}, {"refine": ("chunk",)}, {"every": 0}):
        with pytest.raises(InvalidRequestError, match=r"prune\.positions"):
            stream(**changes)
    loop = load(model)
    refusals: list[tuple[Request, str]] = [
        (request("a", PROMPT, PruneParams(policy="knorm", positions="cache")), "goes with: window"),
        (request("b", PROMPT, stream(), max_tokens=400), "stream"),
        (request("c", LONG, stream(positions="text")), "context"),
        (request("d", PROMPT, stream(keep=0.5), max_tokens=300), "stream"),
    ]
    for one, reason in refusals:
        with pytest.raises((InvalidRequestError, ContextLengthError), match=reason):
            loop.scheduler.add(one)
    with pytest.raises(InvalidRequestError, match="own model code"):
        load(model, runner="transformers").scheduler.add(request("e", PROMPT, stream()))
