"""The micro-batches of a run: those of one step, dealt to the processes, and those of a whole file.

It knows no model and no loss.
"""

from services.trainer.train.data.batches.file_batches import FileBatches
from services.trainer.train.data.batches.micro_batch import (
    MicroBatch,
    lay_out,
    layout_for,
    micro_batches,
    row_groups,
    row_lengths,
    without_labels,
)
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.runtime.process_group import ALONE, Group, deal


def batches_of_step(
    inputs: Inputs, step: int, group: Group = ALONE, tokens_max: int | None = None
) -> tuple[list[MicroBatch], int]:
    """This process's micro-batches of a step, and how many tokens the whole step holds, pads not counted. `tokens_max`
    takes the place of the spec's."""
    sequences = inputs.train.sequences
    width = inputs.train.rows.rows_per_example
    chosen = inputs.schedule.sequences_of_step(step, sequences.count)
    indices = [row for sequence in chosen.tolist() for row in sequences.groups[sequence][::width]]
    batches = _share(inputs, inputs.train.rows, indices, group, tokens_max or inputs.spec.micro_batch_tokens)
    return batches, int(sequences.token_counts[chosen].sum())


def mismatched_of_step(inputs: Inputs, step: int, group: Group, tokens_max: int) -> list[MicroBatch]:
    """This process's micro-batches of the mismatched rows of a step, which there must be: as many as the step has
    rows."""
    assert inputs.train_mismatched is not None
    sequences = inputs.train.sequences
    chosen = inputs.schedule.sequences_of_step(step, sequences.count)
    indices = [row for sequence in chosen.tolist() for row in sequences.groups[sequence]]
    return _share(inputs, inputs.train_mismatched, indices, group, tokens_max)


def validation_batches(inputs: Inputs, group: Group = ALONE, tokens_max: int | None = None) -> FileBatches:
    """This process's part of the validation file, which there must be. `tokens_max` takes the place of the spec's."""
    assert inputs.validation is not None
    return batches_of_file(inputs, inputs.validation.rows, group, tokens_max)


def batches_of_file(
    inputs: Inputs, rows: TokenRows, group: Group = ALONE, tokens_max: int | None = None
) -> FileBatches:
    """This process's part of all rows of a file."""
    spec = inputs.spec
    return FileBatches(
        rows,
        tokens_max=tokens_max or spec.micro_batch_tokens,
        layout=layout_for(spec.device, padded=inputs.padded),
        device=spec.device,
        group=group,
    )


def idle_batch(inputs: Inputs, rows: TokenRows, batches: list[MicroBatch]) -> MicroBatch:
    """The smallest of some micro-batches of `rows`, with nothing to learn."""
    width = rows.rows_per_example
    lengths = row_lengths(rows, [row for batch in batches for row in batch.rows[::width]], width)
    shortest = min(lengths, key=lambda index: lengths[index])
    layout = layout_for(inputs.spec.device, padded=inputs.padded)
    return without_labels(lay_out(rows, [shortest], layout=layout, device=inputs.spec.device, width=width))


def _share(inputs: Inputs, rows: TokenRows, indices: list[int], group: Group, tokens_max: int) -> list[MicroBatch]:
    """The rows that fall to this process, as micro-batches. All processes get equally many. A process that has fewer
    computes some without labels, because sharded weights are gathered by all at once."""
    device = inputs.spec.device
    layout = layout_for(device, padded=inputs.padded)
    width = rows.rows_per_example

    def lay(share: list[int]) -> list[MicroBatch]:
        return micro_batches(rows, share, tokens_max=tokens_max, layout=layout, device=device, width=width)

    if group.size == 1:
        return lay(indices)
    lengths = row_lengths(rows, indices, width)
    shares = deal(lengths, group.size)
    counts = [len(row_groups(rows, share, tokens_max=tokens_max, layout=layout, width=width)) for share in shares]
    batches = lay(shares[group.rank])
    missing = max(counts) - len(batches)
    if missing:
        (idle,) = lay([min(indices, key=lambda index: lengths[index])])
        batches += [without_labels(idle)] * missing
    return batches
