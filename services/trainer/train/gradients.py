"""The gradients of one step: forward and backward over its micro-batches, on every process, in as much memory as there is.

When memory runs out the step starts again with micro-batches of half the tokens: twice as many of them, the same rows, the same
sums. It knows no optimizer, and a step that is done is never done again.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.distributed import seed_of_step
from services.trainer.train.failures import platform_failure
from services.trainer.train.spec import MICRO_BATCH_TOKENS_MIN

if TYPE_CHECKING:
    from services.trainer.train.run import Run

# What torch's allocators say; only that of CUDA has a type of its own.
_OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def gradients_of_step(run: "Run", step: int) -> tuple[Any, int]:
    """The mean loss over the labelled tokens, or the pairs of answers, of the whole step, and how many tokens it has. The
    gradients are those of that mean and the same on every process. Raises Failure(platform, JOB_TOO_LARGE) when not even single
    rows fit."""
    while True:
        random_state = torch.get_rng_state()
        batches, tokens = run.batches.take(step, run.micro_batch_tokens)
        loss = _try(run, step, batches)
        # One that ran out of memory takes the others along: the division of rows is everybody's.
        if not run.group.any(loss is None):
            assert loss is not None
            run.group.add_gradients(run.model.trainable.values())
            return run.group.total([loss])[0], tokens
        run.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.set_rng_state(random_state)
        _halve(run, step, batches)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch or of Python found no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)


def _try(run: "Run", step: int, batches: list[MicroBatch]) -> Any | None:
    """This process's part of the loss; None when memory ran out. The frames that hold the tensors of a failed pass are gone when
    it returns."""
    group = run.group
    objective = run.objective
    (units,) = group.total([sum(objective.units(batch) for batch in batches)])
    if group.size > 1:
        torch.manual_seed(seed_of_step(run.inputs.spec.seed, step, group.rank))
    # FSDP takes the mean over the processes where we want the sum.
    scale = (group.size if group.sharded else 1) / units
    # It stays where it is made: to look at it after every micro-batch would let a GPU run dry.
    loss = torch.zeros((), dtype=torch.float64, device=run.model.device)
    try:
        for batch in batches:
            batch_loss = objective.loss_sum(run.model, batch)
            (batch_loss * scale).backward()
            loss += batch_loss.detach().double() / units
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if group.sharded:
            # The others wait in the middle of a pass for weights that this one will not gather.
            raise platform_failure("TRAINING_FAILED", f"out of memory at step {step + 1}: {error}") from error
        return None
    return loss


def _halve(run: "Run", step: int, batches: list[MicroBatch]) -> None:
    spent = run.micro_batch_tokens
    longest = max(batch.input_ids.shape[-1] for batch in batches) if batches else 0
    fewest = run.inputs.train.rows.rows_per_example
    alone = run.group.any(any(len(batch.rows) > fewest for batch in batches))
    if not alone or spent <= MICRO_BATCH_TOKENS_MIN:
        raise platform_failure(
            "JOB_TOO_LARGE",
            f"out of memory at step {step + 1} with micro-batches of one row (micro_batch_tokens {spent}, longest row here "
            f"{longest} tokens): lower max_seq_length, or ask for larger or more devices",
        )
    run.micro_batch_tokens = max(MICRO_BATCH_TOKENS_MIN, spent // 2)
    run.position = replace(run.position, micro_batch_tokens=run.micro_batch_tokens)
    run.emit(
        "warning",
        code="OUT_OF_MEMORY_RETRIED",
        message=f"out of memory at step {step + 1}: micro-batches have at most {run.micro_batch_tokens} tokens from here on "
        f"instead of {spent}, and there are about twice as many of them; the step is done again with the same rows",
    )
