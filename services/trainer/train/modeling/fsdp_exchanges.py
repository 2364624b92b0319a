"""The collectives of sharded weights, counted, so that a process that ran out of memory can do a pass again.

It knows no model and no loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class Exchanges:
    """Counts what the processes have exchanged in a pass. A process that ran out of memory in the middle begins the
    pass anew, without exchanging again what the others have got already. So all of them come to its end, and its result
    is dropped."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._done = self._to_skip = 0

    def listen_to(self, module: Any) -> None:
        module.set_custom_all_gather(_Exchange(self, dist.all_gather_single))
        module.set_custom_reduce_scatter(_Exchange(self, dist.reduce_scatter_single))

    def begin(self) -> None:
        """A pass begins: everything that is done with one micro-batch."""
        self._done = self._to_skip = 0

    def repeat(self) -> None:
        """The next pass repeats the one that failed."""
        self._root.reset_iter_state()
        self._to_skip = self._done

    def exchange(self, collective: Callable[..., Any], output_tensor: Any, input_tensor: Any, **how: Any) -> Any:
        if self._to_skip:
            self._to_skip -= 1
            # The result of this pass is dropped, but what was in this memory might not even be numbers.
            output_tensor.zero_()
            return None
        under_way = collective(output_tensor, input_tensor, **how)
        self._done += 1
        return under_way


class _Exchange:
    """What FSDP takes in place of its own all-gather or reduce-scatter, which this one calls."""

    def __init__(self, exchanges: Exchanges, collective: Callable[..., Any]) -> None:
        self._exchanges = exchanges
        self._collective = collective

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, **how: Any) -> Any:
        return self._exchanges.exchange(self._collective, output_tensor, input_tensor, **how)
