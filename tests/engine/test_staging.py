"""Uploads and step times as a GPU would see them, with stand-ins for what only a GPU has."""

from typing import Any

import numpy as np
import pytest
import torch

from quire.engine.staging import upload
from quire.engine.timer import StepTimer


def test_on_a_cpu_nothing_is_copied() -> None:
    numbers = np.arange(5, dtype=np.int32)
    tensor = upload(numbers, torch.device("cpu"))
    assert tensor.dtype == torch.int32 and tensor.data_ptr() == numbers.ctypes.data


def test_to_a_gpu_it_goes_through_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Host:
        def pin_memory(self) -> "Host":
            calls.append(("pinned",))
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> "Host":
            calls.append((device.type, non_blocking))
            return self

    monkeypatch.setattr(torch, "from_numpy", lambda array: Host())
    upload(np.zeros(2), torch.device("cuda"))
    assert calls == [("pinned",), ("cuda", True)]


def test_forward_times_of_unfetched_steps_are_counted_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk inside a prompt reads nothing back, so its events may not have passed when its step returns."""
    passed: list[bool] = [False]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def query(self) -> bool:
            return passed[0]

        def elapsed_time(self, other: "Event") -> float:
            assert passed[0], "an event that has not passed has no time"
            return 20.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    reported = []
    for fetches in (False, False, True, True):
        moments = timer.now(), timer.now(), timer.now()
        passed[0] = fetches
        reported.append(timer.seconds(*moments))
        passed[0] = False
    assert np.array(reported) == pytest.approx(np.array([[0.0] * 2, [0.0] * 2, [0.06] * 2, [0.02] * 2]))
