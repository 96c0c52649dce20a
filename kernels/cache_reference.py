"""Writing into the paged KV cache in plain torch: the oracle of the contract in `kernels.cache`."""

import torch
from torch import Tensor


def append_kv_reference(
    pool: Tensor, entry_positions: Tensor, key: Tensor, value: Tensor, destinations: Tensor, positions: Tensor
) -> None:
    """See `kernels.cache.append_kv`."""
    num_pages, _, page_size, width = pool.shape
    entries = destinations.reshape(-1)
    # A page's values follow its keys, so entry e = page * B + offset has its key at row e + page * B of the pool.
    key_rows = entries + entries.div(page_size, rounding_mode="floor") * page_size
    rows = pool.view(num_pages * 2 * page_size, width)
    rows.index_copy_(0, key_rows, key.reshape(-1, width).to(pool.dtype))
    value_dim = value.shape[-1]
    rows[:, :value_dim].index_copy_(0, key_rows + page_size, value.reshape(-1, value_dim).to(pool.dtype))
    heads = destinations.shape[1]
    entry_positions.view(-1).index_copy_(0, entries, positions.to(torch.int32).repeat_interleave(heads))
