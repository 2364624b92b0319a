"""How many steps a run has, and at which of them it is evaluated.

Pure. The scheduler tells by these rules what a run will do, and the trainer runs by them.
"""


def steps_of_epoch(sequence_count: int, sequences_per_step: int) -> int:
    """The last step of an epoch takes what is left."""
    return -(-sequence_count // sequences_per_step)


def evaluation_schedule(steps_per_epoch: int, epochs: int, evaluations: int) -> tuple[tuple[int, int], ...]:
    """(number, step) of every evaluation: `evaluations` evenly over each epoch, the last at its end. When an epoch has
    fewer steps than evaluations, several fall on one step, and each of them is done."""
    plan = []
    for epoch in range(epochs):
        for number in range(1, evaluations + 1):
            step = epoch * steps_per_epoch + -(-steps_per_epoch * number // evaluations)
            plan.append((epoch * evaluations + number, step))
    return tuple(plan)
