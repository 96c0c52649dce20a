"""Host numbers on their way to the device: `upload`."""

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
