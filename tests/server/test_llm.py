"""The offline API on the embedded model: texts, counts, stop strings, seeds, refusals."""

import pytest

from quire.core.errors import ContextLengthError, InvalidRequestError
from quire.core.request import Request
from quire.server.llm import LLM, SamplingParams

PROMPTS = ["import os\nimport ", "def main(", "class Node:\n    def __init__(self"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The embedded model in float32."""
    return LLM(dtype="float32", max_num_seqs=4, kv_memory=64 * 2**20)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY, progress=False)
    alone = [llm.generate([prompt], GREEDY, progress=False)[0] for prompt in PROMPTS]
    assert [c.choices[0].text for c in together] == [c.choices[0].text for c in alone]
    assert all(len(c.choices[0].token_ids) == 12 for c in together)
    assert [c.choices[0].finish_reason for c in together] == ["length"] * 3


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    (completion,) = llm.generate(PROMPTS[:1], GREEDY, progress=False)
    ids = completion.prompt_ids + completion.choices[0].token_ids
    assert llm.tokenizer.decode(ids) == PROMPTS[0] + completion.choices[0].text


def test_one_prompt_and_one_stop_need_no_list(llm: LLM) -> None:
    (listed,) = llm.generate(PROMPTS[:1], GREEDY, progress=False)
    assert llm.generate(PROMPTS[0], GREEDY, progress=False) == [listed]
    assert llm.generate(listed.prompt_ids, GREEDY, progress=False) == [listed]
    stop = listed.choices[0].text[3:6]
    assert llm.generate(PROMPTS[0], GREEDY, stop=stop, progress=False)[0].choices[0].text == listed.choices[0].text[:3]


def test_parameters_per_prompt_and_several_choices(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True, n=n, seed=n) for n in (1, 2, 3)]
    completions = llm.generate(PROMPTS, params, progress=False)
    assert [[len(choice.token_ids) for choice in c.choices] for c in completions] == [[1], [2, 2], [3, 3, 3]]


def test_stop_string_ends_and_is_cut(llm: LLM) -> None:
    text = llm.generate(PROMPTS[1:2], GREEDY, progress=False)[0].choices[0].text
    stop = text[len(text) // 2 :][:2]
    choice = llm.generate(PROMPTS[1:2], GREEDY, stop=[stop], progress=False)[0].choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_structured_outputs_bind_all_prompts(llm: LLM) -> None:
    completions = llm.generate(PROMPTS, GREEDY, structured_outputs={"choice": ["yes", "no"]}, progress=False)
    assert {c.choices[0].text for c in completions} <= {"yes", "no"}
    with pytest.raises(InvalidRequestError, match="regex"):
        llm.generate(PROMPTS, GREEDY, structured_outputs={"regex": "("}, progress=False)


def test_prompt_and_output_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    (completion,) = llm.generate(PROMPTS[2:], params, progress=False)
    assert len(completion.prompt_logprobs) == len(completion.prompt_ids) - 1
    assert [entry.token_id for entry in completion.prompt_logprobs] == completion.prompt_ids[1:]
    choice = completion.choices[0]
    assert [entry.top[0][0] for entry in choice.logprobs] == choice.token_ids


def test_a_seeded_run_repeats() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = []
    for seed in (1, 1, 2):
        llm = LLM(seed=seed, max_num_seqs=1, kv_memory=16 * 2**20)
        texts.append(llm.generate(PROMPTS[:1], params, progress=False)[0].choices[0].text)
    assert texts[0] == texts[1] != texts[2]


def test_a_seeded_run_repeats_whatever_is_drafted() -> None:
    """How many tokens are drafted follows the clock; what is drawn must not."""
    params, texts = SamplingParams(max_tokens=24, ignore_eos=True), set()
    for draft, draft_tokens in (("none", None), ("ngram", 2), ("auto", 5)):
        llm = LLM(seed=3, max_num_seqs=2, kv_memory=16 * 2**20, draft=draft, draft_tokens=draft_tokens)
        both = llm.generate(PROMPTS[:2], params, progress=False)
        texts.add(tuple(one.choices[0].text for one in both))
    assert len(texts) == 1


def test_drafts_can_be_declined(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = llm._loop.submit, list[bool]()

    def spy(request: Request) -> None:
        asked.append(request.speculate)
        submit(request)

    monkeypatch.setattr(llm._loop, "submit", spy)
    llm.generate(PROMPTS[:1], GREEDY, progress=False)
    llm.generate(PROMPTS[:1], GREEDY, speculate=False, progress=False)
    assert asked == [True, False]


def test_refusals_leave_the_engine_usable(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="5,000"):
        llm.generate([[5] * 5000], GREEDY, progress=False)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["x = 1", ""], GREEDY, progress=False)
    with pytest.raises(InvalidRequestError, match="2 prompts"):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    with pytest.raises(InvalidRequestError, match="single numbers"):
        llm.generate([5, "a"], GREEDY, progress=False)  # type: ignore[arg-type]
    assert llm.generate(["x"], GREEDY, progress=False)[0].choices[0].token_ids
