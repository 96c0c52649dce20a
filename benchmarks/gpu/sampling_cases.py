"""Sampling and verification over rows of logits, each against the bytes it must move; torch where it does not sync."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.measure import Meter, Row, Work
from quire.kernels import sampling
from quire.kernels.cuts_triton import Truncation
from quire.kernels.logprobs_triton import token_logprobs_triton
from quire.kernels.rejection_triton import judge_drafts_triton
from quire.kernels.rows_triton import Penalties
from quire.kernels.sampling_triton import draw_triton, processed_logits_triton

Case = tuple[str, Callable[[], object], Callable[[], object] | None, Work]


def logits_like(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """[R, V]: a broad floor, and above it some tens of tokens that share most of the mass, as language models have."""
    logits = torch.randn(rows, vocabulary, device=device) * 2
    head = min(50, vocabulary)
    places = torch.randint(vocabulary, (rows, head), device=device)
    return logits.scatter(1, places, 16 - torch.arange(head, device=device).float().sqrt().expand(rows, -1) * 1.5)


def draw_case(device: torch.device, rows: int, vocabulary: int, penalised: bool) -> Case:
    """A token of each row's whole distribution, half of the rows greedy; torch computes each kind by itself."""
    logits = logits_like(rows, vocabulary, device)
    heat = (torch.arange(rows, device=device) % 2).float()
    slots = torch.arange(rows, device=device)
    strengths = torch.tensor([1.2, 0.1, 0.1], device=device).repeat(rows, 1)
    counts = torch.zeros(rows, vocabulary, dtype=torch.int32, device=device)
    tables = Penalties(slots, counts, counts > 0, strengths) if penalised else None
    minimum = torch.zeros_like(heat)
    drawn, greedy = slots[1::2], slots[::2]

    def plain() -> None:
        adjusted = sampling.adjust_penalties(logits, counts, counts > 0, *strengths.T) if penalised else logits
        sampling.greedy_tokens(adjusted[greedy])
        sampling.sample_full(adjusted[drawn], heat[drawn], minimum[drawn], slots[drawn], slots[drawn])

    run = partial(draw_triton, logits, heat, minimum, slots, slots, tables)
    name = f"draw {rows} tokens{', penalised' if penalised else ''}"
    return name, run, plain, Work(rows * vocabulary * (9 if penalised else 4))


def cut_cases(device: torch.device, rows: int, vocabulary: int) -> Iterator[Case]:
    """Rows of top-k 50 and top-p 0.95: drawn, written out, and judged against another row's."""
    logits = logits_like(rows, vocabulary, device)
    one, keys = torch.ones(rows, device=device), torch.arange(rows, device=device)
    cuts = Truncation(torch.full_like(keys, 50), one * 0.95)
    run = partial(draw_triton, logits, one, one * 0, keys, keys, None, cuts)
    yield f"draw {rows} tokens, top-k and top-p", run, None, Work(rows * vocabulary * 4)
    only_p = Truncation(keys * 0, one * 0.95)
    run = partial(draw_triton, logits, one, one * 0, keys, keys, None, only_p)
    yield f"draw {rows} tokens, top-p", run, None, Work(rows * vocabulary * 4)
    write = partial(processed_logits_triton, logits, one, one * 0, cuts)
    yield f"processed logits of {rows} rows", write, None, Work(rows * vocabulary * 8)
    p, q = write(), processed_logits_triton(logits + torch.randn_like(logits), one, one * 0, cuts)
    drafts = draw_triton(q, one, one * 0, keys, keys)
    judge = partial(judge_drafts_triton, p, drafts, q, keys - keys % 4, keys, keys)
    yield f"judge {rows} drafts", judge, None, Work(rows * vocabulary * 8)


def logprob_case(device: torch.device, rows: int, vocabulary: int) -> Case:
    """Of a token and of the 5 best."""
    logits, tokens = logits_like(rows, vocabulary, device), torch.zeros(rows, dtype=torch.int64, device=device)
    arguments = (logits, tokens, 5)
    run, plain = partial(token_logprobs_triton, *arguments), partial(sampling.token_logprobs, *arguments)
    return f"log-probabilities of {rows} rows, top 5", run, plain, Work(rows * vocabulary * 4)


def rows(meter: Meter, *, tiny: bool) -> Iterator[Row]:
    """Every case at several batch sizes."""
    vocabulary = 2500 if tiny else 151936
    for count in (2,) if tiny else (1, 64, 256):
        cases = [draw_case(meter.device, count, vocabulary, penalised) for penalised in (False, True)]
        cases += [*cut_cases(meter.device, count, vocabulary), logprob_case(meter.device, count, vocabulary)]
        for name, run, plain, work in cases:
            yield meter.row("sampling", name, "quire", run, work)
            if plain is not None:
                yield meter.row("sampling", name, "torch", plain, work)
