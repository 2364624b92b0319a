"""What a process does when memory runs out in the middle of a micro-batch.

It drops that micro-batch. Where other processes wait for its weights or gradients, it goes through the rest of the pass
with them. Then the whole is done again in micro-batches of half the size. It knows no objective, no optimizer and no
schedule.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group
from services.trainer.train.settings.failures import Failure, platform_failure
from services.trainer.train.settings.limits import MICRO_BATCH_TOKENS_MIN

T = TypeVar("T")
# The words of torch's allocators; only that of CUDA has an error type of its own.
_OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch or of Python found no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)


def unless_full(work: Callable[[], T]) -> T | None:
    """The result of `work`, or None when memory ran out. By then the frames that hold what was made are gone."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def fits(
    model: CausalModel,
    group: Group,
    batches: Iterable[MicroBatch],
    work: Callable[[MicroBatch], None],
    idle: Callable[[], MicroBatch],
) -> bool:
    """Does `work` with every micro-batch. Returns false, on every process, when one of them ran out of memory; what was
    done is then void. `idle` gives a micro-batch without labels that takes next to no memory."""
    enough = True
    for batch in batches:
        if enough:
            enough = _try(model, batch, work)
            if not enough and group.sharded:
                _go_along(model, work, idle)
        elif group.sharded:
            work(idle())
        elif group.size == 1:
            break
    return not group.any(not enough)


def halve(tokens: int, what: str, *, divisible: bool) -> int:
    """The next smaller size of micro-batches. Micro-batches that hold single rows, or pairs, are not `divisible`.
    Raises Failure(platform, JOB_TOO_LARGE) when there is no smaller size."""
    if not divisible or tokens <= MICRO_BATCH_TOKENS_MIN:
        raise _too_large(f"{what} with micro-batches of one row (micro_batch_tokens {tokens})")
    return max(MICRO_BATCH_TOKENS_MIN, tokens // 2)


@contextlib.contextmanager
def too_large_when_full(what: str) -> Iterator[None]:
    """For work that cannot be done in smaller pieces: a lack of memory becomes Failure(platform, JOB_TOO_LARGE)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(what) from error


def release() -> None:
    """Gives memory that an allocator keeps for later back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _try(model: CausalModel, batch: MicroBatch, work: Callable[[MicroBatch], None]) -> bool:
    if model.exchanges is not None:
        model.exchanges.begin()

    def whole_pass() -> bool:
        work(batch)
        return True

    return unless_full(whole_pass) is not None


def _go_along(model: CausalModel, work: Callable[[MicroBatch], None], idle: Callable[[], MicroBatch]) -> None:
    """The others are in the middle of a pass, waiting for weights of this process or for its part of a gradient."""
    assert model.exchanges is not None
    release()
    model.exchanges.repeat()
    with too_large_when_full("with a single row"):
        work(idle())


def _too_large(what: str) -> Failure:
    return platform_failure(
        "JOB_TOO_LARGE", f"out of memory {what}: lower max_seq_length, or ask for larger or more devices"
    )
