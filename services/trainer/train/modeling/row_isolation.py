"""Whether rows of a micro-batch see nothing of each other: tried at load, with two short rows and the chosen attention.

Packed into one line, attention stays within a row. The state of a recurrence or a convolution may run on into the next
row, and so do positions that a family counts by itself. Which family does so depends on its code and on the kernels
that are installed, so it is measured. It knows no dataset and no loss.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.trainer.train.data.batches.micro_batch import Layout, MicroBatch, lay_out
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.modeling.base_model import CausalModel, logits_of
from services.trainer.train.runtime.process_group import Group
from services.trainer.train.settings.failures import user_failure

# Nats a token, in float32 and in reduced precision. Rows that see each other were found 0.01 to 5 nats apart. To pad
# without need only takes time; to refuse a model takes more certainty.
_EXACT = 1e-3
_REDUCED: dict[Layout, float] = {"packed": 0.01, "padded": 0.1}
# The same row beside a copy of itself shows how far sums in another order move it.
_TIMES_NOISE = 4.0
# Of the two rows. The second one is short, so that what reaches its first tokens alone is not averaged away.
_LENGTHS = (17, 9)


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """`difference` is how far (nats a token, the mean of a row) scores in a layout are from those of a row alone;
    whether that is nothing but the order of sums, on all processes, is `holds`."""

    difference: float
    holds: bool


def layout_that_isolates(model: CausalModel, wanted: Layout, group: Group) -> tuple[Layout, Isolation | None]:
    """The wanted layout, or "padded" where packed rows see each other; then with what was measured. All processes call
    it together and get the same layout. No random state is touched. Raises Failure(user, MODEL_INVALID) when padded
    rows see each other, too."""
    was_training = model.module.training
    model.module.eval()
    try:
        found = _measure(model, "packed", group) if wanted == "packed" else None
        if found is not None and found.holds:
            return "packed", None
        padded = _measure(model, "padded", group)
    finally:
        model.module.train(was_training)
    if not padded.holds:
        raise user_failure(
            "MODEL_INVALID",
            f"the architecture {type(model.base).__name__} cannot be trained: a row scores {padded.difference:.3g} "
            "nats a token otherwise when another row or padding lies beside it, so that it sees what is not its own",
        )
    return "padded", found


def _measure(model: CausalModel, layout: Layout, group: Group) -> Isolation:
    rows = _two_rows(_vocabulary(model))
    alone = [_scores(model, rows, [row], layout) for row in (0, 1)]
    copies = [_scores(model, rows, [row, row], "padded")[: len(alone[row])] for row in (0, 1)]
    together = _scores(model, rows, [0, 1], layout).split([len(scores) for scores in alone])
    noise, difference = (
        max(float((ours - theirs).abs().mean()) for ours, theirs in zip(alone, others, strict=True))
        for others in (copies, together)
    )
    is_exact = model.device == "cpu" and model.head_weight.dtype == torch.float32
    tolerance = max(_EXACT if is_exact else _REDUCED[layout], _TIMES_NOISE * noise)
    # Not true of NaN.
    holds = difference <= tolerance
    return Isolation(difference=difference, holds=not group.any(not holds))


def _vocabulary(model: CausalModel) -> int:
    return int(min(model.head_weight.shape[0], model.base.get_input_embeddings().weight.shape[0]))


def _two_rows(vocabulary: int) -> TokenRows:
    """Ids from all over the vocabulary, in an order that no text has; every token but the first of a row is scored."""
    first, second = _LENGTHS
    ids = (np.arange(first + second, dtype=np.int64) * 7919 + 11) % vocabulary
    labelled = np.ones(first + second, np.bool_)
    labelled[[0, first]] = False
    return TokenRows(
        ids=ids.astype(np.int32),
        labelled=labelled,
        offsets=np.cumsum([0, first, second]).astype(np.int64),
        rows=2,
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=first,
    )


def _scores(model: CausalModel, rows: TokenRows, group: list[int], layout: Layout) -> Any:
    """Log-probabilities of all labelled tokens, row after row, float32 on the CPU."""
    batch = lay_out(rows, group, layout=layout, device=model.device)
    with torch.no_grad():
        scores = model.call(_log_probs, model, batch)
    return scores.cpu()


def _log_probs(model: CausalModel, batch: MicroBatch) -> Any:
    hidden, targets = model.labelled_hidden(batch)
    table = torch.log_softmax(logits_of(hidden, model.head_weight, model.softcap), dim=-1)
    return table.gather(1, targets[:, None]).squeeze(1)
