"""Prefetch: the micro-batches of the next step, laid out while the present one is computed.

They are a function of the step and the size of micro-batches alone and draw from no generator. So it does not matter
when they are made, or whether a run is killed in between. At most one step is kept.
"""

from concurrent.futures import Future

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.data.batches.run_batches import batches_of_step
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.memory.out_of_memory import unless_full
from services.trainer.train.runtime.background import begin
from services.trainer.train.runtime.process_group import Group

Laid = tuple[list[MicroBatch], int]


class StepBatches:
    def __init__(self, inputs: Inputs, group: Group) -> None:
        self._inputs = inputs
        self._group = group
        self._ahead: tuple[tuple[int, int], Future[Laid]] | None = None

    def take(self, step: int, tokens_max: int) -> Laid | None:
        """This process's micro-batches of a step, and how many tokens the whole step holds; None when memory has no
        room for them."""
        laid = self._laid_ahead(step, tokens_max)
        if laid is None:
            laid = unless_full(lambda: self._lay(step, tokens_max))
        following = (step + 1, tokens_max)
        if laid is not None and step + 1 < self._inputs.schedule.total_steps:
            self._ahead = following, begin("batches", lambda: self._lay(*following))
        return laid

    def _laid_ahead(self, step: int, tokens_max: int) -> Laid | None:
        """What was laid out ahead. None when there is nothing, or when memory had no room for it beside the step
        before; now it may have."""
        ahead, self._ahead = self._ahead, None
        # After a halving, what lies ready is of the wrong size.
        return unless_full(ahead[1].result) if ahead and ahead[0] == (step, tokens_max) else None

    def _lay(self, step: int, tokens_max: int) -> Laid:
        return batches_of_step(self._inputs, step, self._group, tokens_max)
