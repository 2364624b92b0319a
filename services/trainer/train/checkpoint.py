"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one folder that is whole or absent.

Weights, optimizer, every random state, the position in the plan, the digests of the spec and of the packed data, and the meter
cursor. Safetensors and JSON only. It knows no store and no lease; the agent carries the folders away.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from services.trainer.train.durable import FileDigest, commit_folder, read_whole_folder, remove_folder, sha256_file
from services.trainer.train.export import read_trained_weights, write_trained_weights
from services.trainer.train.failures import Failure, platform_failure, user_failure
from services.trainer.train.model import CausalModel
from services.trainer.train.optim import optimizer_tensors, restore_optimizer
from services.trainer.train.position import Position
from services.trainer.train.spec import Spec

VERSION = 1
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"
STATE = "state.json"
_NAME = "step-{:08d}"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint must share with the run that goes on from it."""

    spec_digest: str
    packing_digest: str
    base_revision: str


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    path: Path
    files: list[FileDigest]
    manifest_sha256: str


def save_checkpoint(
    root: Path, position: Position, identity: Identity, model: CausalModel, optimizer: Any, spec: Spec, asked: bool
) -> SavedCheckpoint:
    state = {
        "version": VERSION,
        "asked": asked,
        "position": asdict(position),
        "identity": asdict(identity),
        "machine": {"device": spec.device.split(":")[0], "threads": spec.threads, "torch": str(torch.__version__)},
        "schedule": {"step": position.step, "learning_rate": optimizer.param_groups[0]["lr"]},
        "random": _python_and_numpy_states(),
    }

    def write(folder: Path) -> None:
        write_trained_weights(model, spec, folder)
        save_file(optimizer_tensors(optimizer, model.trainable), folder / OPTIMIZER)
        save_file(_torch_states(), folder / RANDOM)
        (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")

    path = root / _NAME.format(position.step)
    files = commit_folder(path, write, {"step": position.step, "asked": asked})
    return SavedCheckpoint(path=path, files=files, manifest_sha256=sha256_file(path / "manifest.json"))


def find_checkpoint(root: Path, identity: Identity, discard: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of this very run below `root`; `discard` hears of those passed over."""
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            _checked_state(path, identity)
        except Failure as failure:
            discard(failure.message)
            continue
        return path
    return None


def load_checkpoint(
    path: Path, identity: Identity, model: CausalModel, optimizer: Any, spec: Spec
) -> tuple[Position, dict[str, Any]]:
    """Puts every state back; returns the position and the machine that wrote it. Raises Failure: MODEL_INVALID for another
    base, TRAINING_INPUT_INVALID for another spec or dataset, DATA_CORRUPT for torn files."""
    state = _checked_state(path, identity)
    try:
        read_trained_weights(model, spec, path)
        restore_optimizer(optimizer, model.trainable, load_file(path / OPTIMIZER))
        # Random states come last: nothing after this line may draw before the next step does.
        _restore_random(state["random"], load_file(path / RANDOM))
        position = Position(**state["position"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise platform_failure("DATA_CORRUPT", f"checkpoint {path.name} cannot be restored: {error}") from error
    return position, state["machine"]


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` safety checkpoints; those that the user asked for stay."""
    safety = [path for path in sorted(root.glob("step-*")) if not _asked(path)]
    for path in safety[:-keep_last]:
        remove_folder(path)


def _checked_state(path: Path, identity: Identity) -> dict[str, Any]:
    try:
        read_whole_folder(path)
        state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        found = Identity(**state["identity"])
        version = state["version"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise platform_failure("DATA_CORRUPT", f"checkpoint {path.name} is not whole: {error}") from error
    if version != VERSION:
        raise platform_failure("DATA_CORRUPT", f"checkpoint {path.name} has version {version}, not {VERSION}")
    if found.base_revision != identity.base_revision:
        raise user_failure(
            "MODEL_INVALID",
            f"checkpoint {path.name} belongs to base model revision {found.base_revision!r}, not {identity.base_revision!r}",
        )
    if found.packing_digest != identity.packing_digest:
        raise user_failure("TRAINING_INPUT_INVALID", f"checkpoint {path.name} belongs to another dataset or packing")
    if found.spec_digest != identity.spec_digest:
        raise user_failure("TRAINING_INPUT_INVALID", f"checkpoint {path.name} belongs to a run with other settings")
    return state


def _asked(path: Path) -> bool:
    """An unreadable one counts as a safety checkpoint: it ages out with them."""
    try:
        return bool(json.loads((path / "manifest.json").read_bytes())["asked"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _torch_states() -> dict[str, Any]:
    states = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"torch_cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _python_and_numpy_states() -> dict[str, Any]:
    # The engine draws from neither; a library that it calls might.
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _restore_random(states: dict[str, Any], tensors: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(tensors["torch_cpu"])
    for index in range(torch.cuda.device_count()):
        if f"torch_cuda_{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"torch_cuda_{index}"], index)
