"""Fits a run into the memory of its devices before any weight is loaded: reads the model's shape and asks the planner.

Where the size of a device is not known, the run goes as its settings say. It knows no weights.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from services.trainer.train.data.batches.micro_batch import layout_for
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.losses.cross_entropy import CHUNK_ROWS, CHUNK_ROWS_CUDA
from services.trainer.train.memory import memory_planner as planner
from services.trainer.train.memory.memory_planner import Devices, Kind, Layout, Shape, Work
from services.trainer.train.modeling.attention import attention_for, caps_scores
from services.trainer.train.modeling.base_model import weights_dtype
from services.trainer.train.modeling.start_adapter import rank_of_run
from services.trainer.train.runtime.process_group import Group

_HEAD = "lm_head.weight"
# A shape without biases is close enough to a model's size; one that misses a kind of layers is not.
_UNEXPLAINED_SHARE_MAX = 0.05


def fit_to_devices(inputs: Inputs, group: Group) -> Layout | None:
    """The same on every process. None when the device's size or the model's shape is not known. Raises Failure(user,
    JOB_TOO_LARGE) when no layout fits."""
    spec = inputs.spec
    base = Path(spec.base_model.directory)
    shape = shape_of_base(base)
    if spec.device_memory_bytes is None or shape is None:
        return None
    kind: Kind = "cuda" if spec.device.startswith("cuda") else "cpu"
    rows, sequences = inputs.train.rows, inputs.train.sequences
    mismatched = inputs.train_mismatched or rows
    sequence_tokens = max(int(each.lengths.max()) * each.rows_per_example for each in (rows, mismatched))
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    eager = attention_for(config, spec.device, weights_dtype(spec.device, full=spec.training.type == "full")) == "eager"
    # A packed line is as long as its whole micro-batch.
    packed_tokens = spec.micro_batch_tokens if layout_for(spec.device) == "packed" else 0
    work = Work(
        rank=rank_of_run(spec),
        sequence_tokens=sequence_tokens,
        step_tokens=int(sequences.token_counts.max()) * spec.sequences_per_step,
        micro_batch_tokens=spec.micro_batch_tokens,
        head_rows=CHUNK_ROWS_CUDA if kind == "cuda" else CHUNK_ROWS,
        evaluates=spec.evaluations > 0 or spec.stores_reference,
        scored_line_tokens=max(sequence_tokens, packed_tokens) if eager else 0,
        capped_scores=caps_scores(config),
    )
    devices = Devices(
        count=group.size,
        memory_bytes=group.least(spec.device_memory_bytes),
        kind=kind,
    )
    # One process has no other to share its weights with.
    asked = None if spec.parallelism == "auto" or group.size == 1 else spec.parallelism
    return planner.choose(shape, work, devices, asked)


def shape_of_base(directory: Path) -> Shape | None:
    """None where config.json has other fields than most families have, or does not explain the weights on disk."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
        sizes = _stored_sizes(directory)
        shape = planner.shape_of({"tie_word_embeddings": _HEAD not in sizes} | config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    stored = sum(size for name, size in sizes.items() if not (shape.tied and name == _HEAD))
    return shape if abs(shape.parameters - stored) <= _UNEXPLAINED_SHARE_MAX * stored else None


def _stored_sizes(directory: Path) -> dict[str, int]:
    """Elements of each tensor, from the headers alone, of the files that transformers loads. Some bases come in a
    second form, too."""
    sizes: dict[str, int] = {}
    for path in directory.glob("model*.safetensors"):
        file: Any
        with safe_open(path, framework="pt") as file:
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return sizes
