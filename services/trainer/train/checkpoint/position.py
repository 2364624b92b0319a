"""Where a run stands: the numbers that are saved with every checkpoint. It knows no tensors."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after `step` finished steps. `epoch` and `epoch_step` are the same in terms of the data order.
    The metered counts cover exactly these steps and evaluations."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    evaluations_done: int = 0
    metered_train_tokens: int = 0
    metered_validation_tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    # Before the first step; measured once, never metered.
    initial_validation_loss: float | None = None
    # Of the last evaluation of preferences.
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    # Early stopping: the best evaluation so far, and how many in a row brought nothing since.
    best_step: int | None = None
    best_loss: float | None = None
    judged_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    # What is left of the setting after memory ran out; None: all of it.
    micro_batch_tokens: int | None = None
    evaluation_tokens: int | None = None
