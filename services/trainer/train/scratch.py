"""One buffer of floats for each device, used again and again: a fresh one of tens of megabytes would cost its page faults each time.

What lies in it is good until the next call. It knows nothing of what it is for.
"""

from math import prod
from typing import Any

import torch

_buffers: dict[Any, Any] = {}


def scratch(shape: tuple[int, ...], device: Any) -> Any:
    """A float32 tensor of this shape with any content, without a gradient."""
    size = prod(shape)
    buffer = _buffers.get(device)
    if buffer is None or buffer.numel() < size:
        # First the old one goes.
        _buffers.pop(device, None)
        del buffer
        buffer = _buffers[device] = torch.empty(size, dtype=torch.float32, device=device)
    return buffer[:size].view(shape)
