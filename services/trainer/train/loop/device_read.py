"""Numbers that a device makes and the host reads later, when the next step is under way.

It knows nothing of their meaning.
"""

from typing import Any

import torch


class DeviceRead:
    """Starts the copy to the host at once. `read` waits for these numbers alone, never for what was launched after
    them."""

    def __init__(self, numbers: Any) -> None:
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:
            # A copy into pinned memory takes its turn among the kernels; the event says when it is done.
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return [float(number) for number in self._numbers.tolist()]
