"""Finds the newest whole checkpoint of a run and puts every state of it back. It knows no store and no lease."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from services.trainer.train.checkpoint.manifest import OPTIMIZER, RANDOM, SHARDS, STATE, VERSION
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.checkpoint.random_states import restore_torch_states
from services.trainer.train.data.run_inputs import Identity
from services.trainer.train.disk.durable import (
    read_whole_folder,
)
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.fsdp import load_shards
from services.trainer.train.modeling.optimizer import empty_optimizer_tensors, restore_optimizer
from services.trainer.train.modeling.trained_weights import read_trained_weights
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.failures import Failure, platform_failure, user_failure
from services.trainer.train.settings.spec import Spec


def find_checkpoint(root: Path, identity: Identity, discard: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of this very run below `root`; `discard` is called for those passed over."""
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            _checked_state(path, identity)
        except Failure as failure:
            discard(failure.message)
            continue
        return path
    return None


def load_checkpoint(
    path: Path, identity: Identity, model: CausalModel, optimizer: Any, spec: Spec, group: Group = ALONE
) -> tuple[Position, dict[str, Any]]:
    """Puts every state back; returns the position and the machine that wrote it. Raises Failure: MODEL_INVALID for
    another base, TRAINING_INPUT_INVALID for another spec or dataset, DATA_CORRUPT for torn files."""
    state = _checked_state(path, identity)
    try:
        if (path / SHARDS).is_dir():
            moments = empty_optimizer_tensors(optimizer, model.trainable)
            load_shards(path / SHARDS, model.trainable, moments, group)
        else:
            read_trained_weights(model, spec, path)
            restore_optimizer(optimizer, model.trainable, load_file(path / OPTIMIZER))
        # Random states come last: nothing after this line may draw before the next step does.
        _restore_random(state["random"], load_file(path / RANDOM))
        position = Position(**state["position"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _bad(f"checkpoint {path.name} cannot be restored: {error}") from error
    return position, state["machine"]


def _checked_state(path: Path, identity: Identity) -> dict[str, Any]:
    try:
        read_whole_folder(path)
        state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        found = Identity(**state["identity"])
        version = state["version"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _bad(f"checkpoint {path.name} is not whole: {error}") from error
    if version != VERSION:
        raise _bad(f"checkpoint {path.name} has version {version}, not {VERSION}")
    if found.base_revision != identity.base_revision:
        raise user_failure(
            "MODEL_INVALID",
            f"checkpoint {path.name} belongs to base model revision {found.base_revision!r}, not "
            f"{identity.base_revision!r}",
        )
    if found.packing_digest != identity.packing_digest:
        raise user_failure("TRAINING_INPUT_INVALID", f"checkpoint {path.name} belongs to another dataset or packing")
    if found.spec_digest != identity.spec_digest:
        raise user_failure("TRAINING_INPUT_INVALID", f"checkpoint {path.name} belongs to a run with other settings")
    return state


def _bad(message: str) -> Failure:
    """Whoever chose the checkpoint is told that another one may do."""
    return platform_failure("DATA_CORRUPT", message, {"cause": "bad_checkpoint"})


def _restore_random(states: dict[str, Any], tensors: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    restore_torch_states(tensors)
