"""The removable heap against a plain dictionary."""

import random

from quire.scheduler.heap import RemovalHeap


def test_any_sequence_of_operations_gives_what_sorting_gives():
    rng = random.Random(1)
    for _ in range(20):
        heap: RemovalHeap[int, str] = RemovalHeap()
        model: dict[int, int] = {}
        for _ in range(400):
            name = rng.randrange(40)
            if rng.random() < 0.6:
                model[name] = rng.randrange(10)
                heap.push(name, model[name], f"i{name}")
            else:
                assert heap.remove(name) == (model.pop(name, None) is not None)
            smallest = min(((key, name) for name, key in model.items()), default=None)
            first = heap.first()
            assert (first and first[:2]) == smallest
            assert first is None or first[2] == f"i{first[1]}"
            assert len(heap) == len(model) and sorted(heap) == sorted(f"i{name}" for name in model)


def test_what_was_removed_is_not_kept():
    heap: RemovalHeap[int, object] = RemovalHeap()
    for number in range(10_000):
        heap.push(number, number, object())
    for number in range(1, 10_000):
        heap.remove(number)
    assert len(heap._heap) < 50
