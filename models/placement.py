"""`Placement`: where a model computes, in which type, and by which kernels. Chosen once, by the engine."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class Placement:
    """Of weights, cache and layers alike."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend = "reference"
    """Which kernels compute."""

    def parameter(self, *shape: int) -> Tensor:
        """An uninitialised parameter; loading fills it."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    @property
    def device_name(self) -> str:
        """For people, e.g. `cpu (2 threads)` or `cuda (NVIDIA H200)`."""
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        return f"cpu ({torch.get_num_threads()} threads)"

    @property
    def dtype_name(self) -> str:
        """E.g. `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")
