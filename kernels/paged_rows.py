"""`PagedRows`: what heads hold, in pages that lie anywhere; kernels read it where it is, other code as one tensor.

Letters: N heads, E entries of the longest, M pages of it, P pages of the pool, B entries of a page.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu_library import PagesArgs


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Entries of heads: keys, values or positions. Read only; what lies past a head's own length is arbitrary."""

    pages: Tensor
    """[P, B, ...]: each page in one piece, pages anyhow apart (a half of the pool, say)."""
    table: Tensor
    """[*N, M] int32: pages of each head, in order."""
    entries: int
    """E, at most M * B."""

    @staticmethod
    def of(states: Tensor) -> "PagedRows":
        """States [N, E, ...] that lie side by side already: a head is one page."""
        states = states if states[0].is_contiguous() else states.contiguous()
        table = torch.arange(len(states), dtype=torch.int32, device=states.device)
        return PagedRows(states, table[:, None], states.shape[1])

    def read(self) -> Tensor:
        """[*N, E, ...], a copy."""
        pages, table = self.pages, self.table
        columns, size = -(-self.entries // pages.shape[1]), pages[0].numel()
        step, rest = divmod(pages.stride(0), size)
        if step > 1 and not rest:
            # As every other block of the whole: torch copies blocks of a contiguous tensor twice as fast.
            shape = ((len(pages) - 1) * step + 1, *pages.shape[1:])
            pages, table = pages.as_strided(shape, (size, *pages.stride()[1:])), table * step
        read = pages.index_select(0, table[..., :columns].flatten())
        whole = read.view(*table.shape[:-1], columns * pages.shape[1], *pages.shape[2:])
        return whole.narrow(table.dim() - 1, 0, self.entries)

    def values(self) -> PagesArgs:
        """For the C++ kernels; tables must be [N, M]. Valid as long as the tensors are."""
        pages, table = self.pages, self.table
        if table.dim() != 2 or table.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(
                f"table must be [N, M] int32 with rows in one piece, got {list(table.shape)} {table.dtype}"
            )
        stride, _, *_ = pages.stride()
        return PagesArgs(pages.data_ptr(), table.data_ptr(), stride, table.stride(0), pages.shape[1])

    def arguments(self) -> "ctypes._CArgObject":
        """`values` as what the kernels are called with."""
        return ctypes.byref(self.values())
