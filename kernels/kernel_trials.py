"""Small random inputs of a model's own shapes for each of Quire's GPU kernels, and what plain torch makes of them.

Pages that no head owns hold NaN: a kernel that reads them shows it. Inputs come from a seed, on the host: every start
sees the same ones. Letters as in `kernels.attention`; R rows of logits, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .append_rotated import Rotation, append_rotated
from .attention import paged_attention
from .attention_columns import attention_columns
from .attention_mass_reference import attention_log_sums, attention_mass
from .backend import Backend
from .cache import append_kv
from .compaction_reference import compact_kv
from .distributions import full_logits, truncated_logits
from .layers_reference import gated_activation
from .norm import add_rms_norm
from .page_bounds_reference import page_key_bounds
from .paged_rows import PagedRows
from .rejection import judge_drafts
from .sampling import adjust_penalties, greedy_tokens, sample_full, sample_truncated

_WINDOW = 37
"""Entries that a windowed layer sees here: its own window would be longer than all there is."""


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What of a model decides how kernels are compiled for it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    vocab_size: int
    windows: tuple[int | None, ...] = (None,)
    """Those of its layers, each once."""
    softcap: float | None = None
    sinks: bool = False
    rotated: int = 0
    """Leading entries of a head that the layers rotate as they store it; 0: heads come rotated."""
    head_norm: bool = False
    """Whether heads are normalised before they are rotated."""
    hidden: int = 0
    """Width of the norms; 0: they are not ours."""
    feed_forward: int = 0
    """Width of the gated activation; 0: it is not ours."""


Pair = tuple[Tensor, Tensor]
"""A kernel's result and its reference's; whole numbers must be equal."""


@dataclass(frozen=True)
class Trial:
    """Where, for what and by what."""

    shape: KernelShape
    device: torch.device
    dtype: torch.dtype
    backend: Backend

    @cached_property
    def generator(self) -> torch.Generator:
        """On the host."""
        return torch.Generator().manual_seed(0)

    def random(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed."""
        return torch.randn(sizes, generator=self.generator).to(self.device, dtype or self.dtype)

    def shuffled(self, count: int) -> Tensor:
        """The numbers below `count`, int64."""
        return torch.randperm(count, generator=self.generator).to(self.device)

    def step(self, lengths: tuple[int, ...], held: tuple[int, ...]) -> "_Step":
        """Sequences that bring so many rows; their heads hold up to `held` entries, in pages in any order."""
        shape, size = self.shape, self.shape.page_size
        rows, most = torch.tensor(lengths), torch.tensor(held)
        kept = (most[:, None] - torch.arange(shape.num_kv_heads) % 3).clamp(min=0)
        pages = (kept + rows[:, None] + size - 1) // size
        columns = int(pages.max()) + 1
        owned = torch.arange(columns) < pages[..., None]
        stranger = int(owned.sum())
        table = torch.full(owned.shape, stranger)
        table[owned] = torch.randperm(stranger, generator=self.generator)
        pool = self.random(stranger + 1, 2, size, shape.head_dim)
        pool[stranger] = float("nan")
        index = torch.arange(columns * size)
        # New entries are as many places behind the first new position as behind the kept ones.
        places = torch.where(index < kept[..., None], index, index - kept[..., None] + most[:, None, None])
        entry_positions = torch.full((stranger + 1, size), -7)
        entry_positions[table[owned]] = places.view(*owned.shape, size)[owned]
        positions = torch.cat([start + torch.arange(n) for start, n in zip(held, lengths, strict=True)])
        return _Step(
            query=self.random(sum(lengths), shape.num_heads, shape.head_dim),
            pool=pool,
            entry_positions=entry_positions.int().to(self.device),
            page_table=table.int().to(self.device),
            kept=kept.int().to(self.device),
            query_start=torch.tensor([0, *lengths]).cumsum(0).int().to(self.device),
            query_lengths=lengths,
            positions=positions.to(self.device),
            max_kept=int((kept + rows[:, None]).max()),
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """The arguments of `paged_attention` of the same names."""

    query: Tensor
    pool: Tensor
    entry_positions: Tensor
    page_table: Tensor
    kept: Tensor
    query_start: Tensor
    query_lengths: tuple[int, ...]
    positions: Tensor
    max_kept: int

    def widened(self) -> "_Step":
        """In float32: what an exact result is computed from."""
        return replace(self, query=self.query.float(), pool=self.pool.float())

    def arguments(self) -> dict[str, Any]:
        """All but `max_kept`."""
        names = (name for name in self.__dataclass_fields__ if name != "max_kept")
        return {name: getattr(self, name) for name in names}


def _stores(trial: Trial) -> Iterator[Pair]:
    """Storing a step's entries, rotated on the way where the layers do that."""
    shape, rows = trial.shape, 5
    heads, kv_heads = shape.num_heads + shape.num_kv_heads, shape.num_kv_heads
    pages = -(-rows * kv_heads // shape.page_size) + 1
    places = trial.shuffled(pages * shape.page_size)[: rows * kv_heads].view(rows, kv_heads)
    positions = torch.arange(rows, device=trial.device) + 1000
    fused = trial.random(rows, heads + kv_heads, shape.head_dim)
    angles = [trial.random(rows, shape.rotated // 2) for _ in range(2)]
    weight = trial.random(heads, shape.head_dim) if shape.head_norm else None
    results = []
    for backend in (trial.backend, "reference"):
        pool = torch.zeros(pages, 2, shape.page_size, shape.head_dim, device=trial.device, dtype=trial.dtype)
        held = torch.zeros(pages, shape.page_size, dtype=torch.int32, device=trial.device)
        own = fused.clone()
        key, value = own[:, shape.num_heads : heads], own[:, heads:]
        if shape.rotated:
            rotation = Rotation(own[:, :heads], angles[0], angles[1], weight, 1e-6)
            append_rotated(rotation, value, pool, held, places, positions, backend)
        else:
            append_kv(pool, held, key, value, places, positions, backend)
        results.append((pool, held, own[:, : shape.num_heads]))
    yield from zip(*results, strict=True)


def _attends(trial: Trial) -> Iterator[Pair]:
    """A token, some to verify and a chunk in one batch: once with long heads, which are split, and once with short."""
    shape = trial.shape
    group = shape.num_heads // shape.num_kv_heads
    lengths = (1, 16 // group + 1, 64 // group + 5)
    sinks = trial.random(shape.num_heads) if shape.sinks else None
    for window in shape.windows:
        options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "value_dim": shape.head_dim}
        options |= {"softcap": shape.softcap, "sinks": sinks}
        options["window"] = None if window is None else min(window, _WINDOW)
        for held in ((40, 300, 150), (9, 2, 0)):
            step = trial.step(lengths, held)
            exact = step.widened()
            expected = paged_attention(**exact.arguments(), max_kept=exact.max_kept, **options)
            for known in (True, False):
                given = step.arguments() | ({} if known else {"query_lengths": None})
                if known or trial.backend == "triton":  # steps of unknown lengths are CUDA graphs
                    result = paged_attention(**given, max_kept=step.max_kept, backend=trial.backend, **options)
                    yield result, expected.to(result.dtype)


def _weighs(trial: Trial) -> Iterator[Pair]:
    """The mass that entries get, for pruning: attention keeps log-sums, and a kernel of its own reads them."""
    from .attention_mass_triton import attention_mass_triton  # triton is installed beside a GPU only

    shape = trial.shape
    step = trial.step((1, 1), (130, 20))
    sums = torch.empty(step.query.shape[:2], device=trial.device)
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "softcap": shape.softcap}
    given, exact = step.arguments(), step.widened().arguments()
    dense = {name: value for name, value in exact.items() if name != "query_start"}
    paged_attention(
        **given, max_kept=step.max_kept, value_dim=shape.head_dim, log_sums=sums, backend=trial.backend, **options
    )
    yield sums, attention_log_sums(**dense, **options)
    mass = attention_mass_triton(**given, log_sums=sums, max_kept=step.max_kept, **options)
    yield mass, attention_mass(**exact, log_sums=sums, max_kept=step.max_kept, **options)


def _watches(trial: Trial) -> Iterator[Pair]:
    """What entries get from rows whose log-sums were not kept, for pruning."""
    shape, rows = trial.shape, 3
    step = trial.step((rows,), (150,))
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "softcap": shape.softcap}
    sinks = trial.random(shape.num_heads) if shape.sinks else None
    for reduce in ("sum", "max"):
        results = []
        for cast, backend in ((step, trial.backend), (step.widened(), "reference")):
            table, lengths = cast.page_table[0], cast.kept[0] + rows
            keys, held = (PagedRows(pages, table, step.max_kept) for pages in (cast.pool[:, 0], cast.entry_positions))
            given = (cast.query, keys, held, lengths, cast.positions)
            results.append(attention_columns(*given, reduce=reduce, sinks=sinks, backend=backend, **options))
        yield results[0], results[1]


def _normalises(trial: Trial) -> Iterator[Pair]:
    """Norms alone and of a sum."""
    if not trial.shape.hidden:
        return
    x, residual = trial.random(3, trial.shape.hidden), trial.random(3, trial.shape.hidden)
    weight = trial.random(trial.shape.hidden)
    for addend in (residual, None):
        results = (add_rms_norm(x, addend, weight, 1e-6, backend) for backend in (trial.backend, "reference"))
        yield from zip(*results, strict=True)


def _activates(trial: Trial) -> Iterator[Pair]:
    """silu(gate) * up, the one activation that is fused."""
    if not trial.shape.feed_forward:
        return
    from .layers_triton import gated_activation_triton  # triton is installed beside a GPU only

    both = trial.random(3, 2 * trial.shape.feed_forward)
    yield gated_activation_triton(both, "silu"), gated_activation(both, "silu")


def _moves(trial: Trial) -> Iterator[Pair]:
    """What pruning keeps moves to a head's first pages, or to others."""
    from .compaction_triton import compact_kv_triton  # triton is installed beside a GPU only

    size, heads, columns = trial.shape.page_size, 3, -(-150 // trial.shape.page_size)
    source, target = trial.shuffled(2 * heads * columns).int().view(2, heads, columns).unbind()
    keep = torch.stack([trial.shuffled(150)[:90].sort().values for _ in range(heads)]).int()
    counts = torch.tensor([90, 0, 71], dtype=torch.int32, device=trial.device)
    whole = trial.random(2 * heads * columns, 2, size, trial.shape.head_dim)
    held = torch.arange(len(whole) * size, dtype=torch.int32, device=trial.device).view(-1, size)
    for in_place in (True, False):
        results = []
        for move in (compact_kv_triton, compact_kv):
            pool, positions = whole.clone(), held.clone()
            move(pool, positions, source, source if in_place else target, keep, counts, in_place=in_place)
            results.append((pool, positions))
        yield from zip(*results, strict=True)


def _bounds(trial: Trial) -> Iterator[Pair]:
    """Least and greatest keys of pages, for `quest`."""
    from .page_bounds_triton import page_key_bounds_triton  # triton is installed beside a GPU only

    pool = trial.random(6, 2, trial.shape.page_size, trial.shape.head_dim)
    pages, counts = (torch.tensor(n, dtype=torch.int32, device=trial.device) for n in ([4, 1, 3], [1, 0, 10**6]))
    counts = counts.clamp(max=trial.shape.page_size)
    results = [torch.zeros(6, 2, trial.shape.head_dim, device=trial.device, dtype=trial.dtype) for _ in range(2)]
    page_key_bounds_triton(results[0], pool, pages, counts)
    page_key_bounds(results[1], pool, pages, counts)
    yield results[0], results[1]


@dataclass(frozen=True, slots=True)
class _Draws:
    """Four rows to be drawn from."""

    logits: Tensor
    heat: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    keys: Tensor
    """Seeds, and positions."""

    @staticmethod
    def of(trial: Trial) -> "_Draws":
        """One of each kind."""
        columns = torch.tensor([[0.7, 1.0, 1.3, 1.0], [0.0, 0.05, 0.0, 0.0], [1.0, 1.0, 0.9, 0.6]]).to(trial.device)
        logits = 3 * trial.random(4, trial.shape.vocab_size, dtype=torch.float32)
        top_k = torch.tensor([0, 7, 50, 0]).to(trial.device)
        return _Draws(logits, columns[0], columns[1], top_k, columns[2], torch.arange(4).to(trial.device) + 11)


def _samples(trial: Trial) -> Iterator[Pair]:
    """Greedy, whole, penalised and truncated rows."""
    from .cuts_triton import Truncation  # triton is installed beside a GPU only
    from .rows_triton import Penalties
    from .sampling_triton import draw_triton

    draws = _Draws.of(trial)
    rows = (draws.logits, draws.heat, draws.min_p)
    yield draw_triton(draws.logits, draws.heat * 0, draws.min_p, draws.keys, draws.keys), greedy_tokens(draws.logits)
    yield draw_triton(*rows, draws.keys, draws.keys), sample_full(*rows, draws.keys, draws.keys)
    counts = (3 * trial.random(4, trial.shape.vocab_size, dtype=torch.float32)).int().clamp(min=0)
    strengths = torch.tensor([1.2, 0.3, 0.2]).repeat(4, 1).to(trial.device)
    adjusted = adjust_penalties(draws.logits, counts, counts > 2, *strengths.unbind(1))
    tables = Penalties(torch.arange(4, device=trial.device), counts, counts > 2, strengths)
    expected = sample_full(adjusted, draws.heat, draws.min_p, draws.keys, draws.keys)
    yield draw_triton(*rows, draws.keys, draws.keys, tables), expected
    cuts = Truncation(draws.top_k, draws.top_p)
    expected = sample_truncated(draws.logits, draws.heat, draws.top_k, draws.top_p, draws.min_p, draws.keys, draws.keys)
    yield draw_triton(*rows, draws.keys, draws.keys, None, cuts), expected


def _judges(trial: Trial) -> Iterator[Pair]:
    """Distributions, and draft tokens by them; each row is a run of its own."""
    draws, rows = _Draws.of(trial), torch.arange(4, device=trial.device)
    arguments = (draws.logits, draws.heat, draws.top_k, draws.top_p, draws.min_p)
    target = truncated_logits(*arguments)
    yield truncated_logits(*arguments, trial.backend).exp(), target.exp()
    draft = full_logits(draws.logits + 1.5 * draws.logits.roll(1), draws.heat, draws.min_p)
    for drafts in (target.argmax(-1), draft.argmax(-1)):
        judged = (target, drafts, draft, rows, draws.keys, draws.keys)
        yield judge_drafts(*judged, trial.backend), judge_drafts(*judged)


def _scores(trial: Trial) -> Iterator[Pair]:
    """Log-probabilities of given tokens and of the best."""
    logits = trial.random(3, trial.shape.vocab_size, dtype=torch.float32)
    tokens = torch.zeros(3, dtype=torch.int64, device=trial.device)
    results = (sampling.token_logprobs(logits, tokens, 5, backend) for backend in (trial.backend, "reference"))
    yield from zip(*results, strict=True)


TRIALS: dict[str, Callable[[Trial], Iterator[Pair]]] = {
    "cache append": _stores,
    "attention": _attends,
    "norm": _normalises,
    "gated activation": _activates,
    "sampling": _samples,
    "draft verification": _judges,
    "log-probabilities": _scores,
    "attention mass": _weighs,
    "attention columns": _watches,
    "compaction": _moves,
    "page bounds": _bounds,
}
"""By the names that a person is told; what every step needs comes first."""
