"""Both runners over the real paged cache: prompts in chunks, then greedy decoding, against the library alone."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from quire.kernels.cache import entry_destinations
from quire.models.context import AttentionContext
from quire.models.runner import ModelRunner

from .conftest import VOCAB
from .test_transformers_runner import CASES

PAGE = 4
COLUMNS = 8
PROMPTS = (11, 6)
NEW_TOKENS = 8


@dataclass
class PagedCache:
    """A pool big enough for both sequences, its pages handed out in a shuffled order."""

    runner: ModelRunner
    pool: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    table: Tensor = field(init=False)
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        spec = self.runner.spec
        shape = (len(PROMPTS), spec.num_layers, spec.num_kv_heads, COLUMNS)
        pages = torch.Size(shape).numel()
        self.pool = torch.zeros(pages, 2, PAGE, spec.head_dim)
        self.positions = torch.zeros(pages, PAGE, dtype=torch.int32)
        self.table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(shape)
        self.kept = torch.zeros(shape[:3], dtype=torch.int32)

    @torch.inference_mode()
    def step(self, chunks: list[Tensor]) -> Tensor:
        """Last logits [S, V] after the next tokens of every sequence."""
        lengths = tuple(len(ids) for ids in chunks)
        start = torch.tensor([0, *lengths]).cumsum(0).int()
        begins = self.kept[:, 0, 0].tolist()
        positions = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])
        total = sum(lengths)
        destinations = entry_destinations(self.table, self.kept, start, page_size=PAGE, num_tokens=total)
        most = max(b + n for b, n in zip(begins, lengths, strict=True))
        context = AttentionContext(
            self.pool, self.positions, self.table, self.kept, start, lengths, positions, destinations, most
        )
        reach = torch.full((total,), max(PROMPTS) + NEW_TOKENS)
        logits = self.runner.forward(torch.cat(chunks), positions, reach, context, start[1:].long() - 1)
        self.kept += torch.tensor(lengths, dtype=torch.int32)[:, None, None]
        return logits


RUNS = [(case, "native") for case in ("llama", "mistral")]
RUNS += [(case, "transformers") for case in ("llama", "mistral", "gemma2", "gpt_oss sinks", "deepseek")]


@pytest.mark.parametrize(("case", "runner"), RUNS)
def test_greedy_text_is_the_librarys(tiny, case, runner):
    model_type, settings = CASES[case]
    made = tiny(model_type, **settings)
    seeded = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, VOCAB, (length,), generator=seeded) for length in PROMPTS]
    expected = [_greedy(made.model, ids) for ids in texts]
    cache = PagedCache(made.load(runner))
    cache.step([ids[:5] for ids in texts])
    chunks = [ids[5:] for ids in texts]
    for _ in range(NEW_TOKENS):
        chunks = [token[None] for token in cache.step(chunks).argmax(-1)]
        texts = [torch.cat([ids, chunk]) for ids, chunk in zip(texts, chunks, strict=True)]
    assert [ids.tolist() for ids in texts] == expected


@torch.inference_mode()
def _greedy(model, ids: Tensor) -> list[int]:
    """`ids` and the most likely tokens after them, the whole text anew at each step."""
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids.tolist()
