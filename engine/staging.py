"""Numbers on their way to the device, `upload`, and back, `Download`; the host goes on meanwhile."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(numbers: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array as a tensor on `device`, of the same type and shape; the host does not wait for the copy.

    On a GPU the numbers go through pinned memory (a copy from any other would wait for all work queued before it).
    Its blocks are torch's: its host allocator keeps them for the next step, and hands a block out again only once the
    event it recorded behind the block's copy has passed. On a CPU the tensor is the array itself: change it no more.
    """
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Download:
    """A small tensor on its way to the host.

    On a GPU the copy is queued at once, behind what computes the tensor and before what is queued later: waiting for
    it waits for none of that.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.device.type != "cpu":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> np.ndarray[Any, Any]:
        """The numbers, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
