"""The reference of answers: log-probabilities under the weights that the run started from.

Under a fresh adapter these weights are the base, which is there when the adapter is off. Where the starting weights
themselves are trained (all weights, or an adapter that goes on) the log-probabilities of every answer are computed
once, before the first step. They travel with the checkpoints, under a digest of the weights and rows that they belong
to.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.data.batches.run_batches import batches_of_file
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.disk.durable import sha256_file
from services.trainer.train.losses.objective import answer_log_probs
from services.trainer.train.memory.out_of_memory import fits, halve, release
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.event_stream import Emit, sign_of_life
from services.trainer.train.runtime.process_group import Group

REFERENCE = "reference.safetensors"
# The files' rows; their mismatched rows are scored as well, where a method compares them.
TRAIN, VALIDATION = "train", "validation"
TRAIN_MISMATCHED, VALIDATION_MISMATCHED = "train_mismatched", "validation_mismatched"
_IDENTITY = "identity"


class Stored:
    """Log-probabilities [rows] of one file's answers under the starting weights."""

    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def log_probs(self, model: CausalModel, batch: MicroBatch) -> Any:
        return self._scores[list(batch.rows)].to(batch.input_ids.device)


def stored_reference(
    inputs: Inputs, model: CausalModel, group: Group, emit: Emit, checkpoint: Path | None
) -> dict[str, Stored]:
    """The stored log-probabilities of each file, by its name. Call it while `model` has the starting weights, before a
    checkpoint's are put in. What the checkpoint carries is taken if it belongs to these weights and rows, and computed
    again if not."""
    identity = _identity(inputs)
    path = inputs.workdir / REFERENCE
    for known in ([] if checkpoint is None else [checkpoint / REFERENCE]) + [path]:
        scores = _read(known, identity)
        if scores is not None:
            break
    else:
        scores = _compute(inputs, model, group, emit)
    if group.local_rank == 0:
        unfinished = path.with_name(f"tmp-{path.name}")
        save_file(scores, unfinished, metadata={_IDENTITY: identity})
        unfinished.rename(path)
    group.wait()
    return {name: Stored(tensor) for name, tensor in scores.items()}


def _identity(inputs: Inputs) -> str:
    """A digest of the starting weights, byte by byte, and of the rows that they score."""
    spec = inputs.spec
    folders = [Path(spec.base_model.directory), *([Path(spec.start_from.directory)] if spec.start_from else [])]
    facts = {
        "weights": [[sha256_file(file) for file in sorted(folder.glob("*.safetensors"))] for folder in folders],
        "train": inputs.train.rows.digest(),
        "validation": inputs.validation.rows.digest() if inputs.validation else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, identity: str) -> dict[str, Any] | None:
    """None for scores of other weights or rows, and for a file that is not whole."""
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get(_IDENTITY) != identity:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None


def _compute(inputs: Inputs, model: CausalModel, group: Group, emit: Emit) -> dict[str, Any]:
    scored = {
        TRAIN: inputs.train.rows,
        VALIDATION: inputs.validation.rows if inputs.validation else None,
        TRAIN_MISMATCHED: inputs.train_mismatched,
        VALIDATION_MISMATCHED: inputs.validation_mismatched,
    }
    files = {name: rows for name, rows in scored.items() if rows is not None}
    total = sum(rows.count for rows in files.values())
    done = 0
    scores: dict[str, Any] = {}
    was_training = model.module.training
    model.module.eval()
    with torch.no_grad():
        for name, rows in files.items():
            scores[name] = _score(inputs, rows, model, group, sign_of_life(emit, "reference", total, done), emit)
            done += rows.count
    model.module.train(was_training)
    return scores


def _score(
    inputs: Inputs, rows: TokenRows, model: CausalModel, group: Group, report: Callable[[int], None], emit: Emit
) -> Any:
    """All rows of a file; again in smaller micro-batches when memory runs out."""
    tokens = inputs.spec.micro_batch_tokens
    while True:
        own = torch.zeros(rows.count, dtype=torch.float64)
        batches = batches_of_file(inputs, rows, group, tokens)

        def score(batch: MicroBatch, own: Any = own) -> None:
            found = answer_log_probs(model, batch)
            if batch.labelled:
                own[list(batch.rows)] = found.double().cpu()
            report(len(batch.rows))

        if fits(model, group, batches, score, batches.idle):
            return group.summed(own).float()
        release()
        tokens = halve(tokens, "while the reference is computed", divisible=batches.is_divisible)
        emit(
            "warning",
            code="OUT_OF_MEMORY_RETRIED",
            message=f"out of memory while the reference is computed: it is done again in micro-batches of at most "
            f"{tokens} tokens",
        )
