"""Rings of queries: what was written last at a position is what is read, also once the tensor has grown."""

import torch

from quire.engine.query_rings import QueryRings


def test_rows_of_single_queries_and_chunks_share_the_rings() -> None:
    rings, window = QueryRings(2, 4), 4
    first = rings.take()
    chunks = torch.randn(2, 7, 3, 5)  # [L', n, H, D]
    for layer in range(2):
        rings.write_chunk(layer, first, 10, chunks[layer])
    assert torch.equal(rings.read(first, torch.arange(13, 17)), chunks[:, -window:])
    others = [rings.take() for _ in range(3)]
    single = torch.randn(2, 2, 3, 5)
    rings.write_rows(torch.tensor([others[2], first]), torch.tensor([3, 17]), single)
    assert torch.equal(rings.read(others[2], torch.tensor([3])), single[:, :1])
    assert torch.equal(rings.read(first, torch.arange(14, 18)), torch.cat([chunks[:, -3:], single[:, 1:]], 1))


def test_a_row_that_is_given_back_is_lent_again() -> None:
    rings = QueryRings(1, 4)
    rows = [rings.take(), rings.take()]
    rings.give(rows[0])
    assert rings.take() == rows[0] and rings.take() not in rows
