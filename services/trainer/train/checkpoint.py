"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one folder that is whole or absent.

Weights, optimizer, every random state, the position in the plan, the digests of the spec and of the packed data, and the meter
cursor. Safetensors and JSON only. It knows no store and no lease; the agent carries the folders away.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from services.trainer.train.distributed import ALONE, Group
from services.trainer.train.durable import (
    FileDigest,
    commit_folder,
    read_whole_folder,
    remove_folder,
    sha256_file,
    unfinished_path,
)
from services.trainer.train.export import read_trained_weights, write_trained_weights
from services.trainer.train.failures import Failure, platform_failure, user_failure
from services.trainer.train.model import CausalModel
from services.trainer.train.optim import empty_optimizer_tensors, optimizer_tensors, restore_optimizer
from services.trainer.train.position import Position
from services.trainer.train.random_states import restore_torch_states, torch_states
from services.trainer.train.shard import load_shards, save_shards, whole
from services.trainer.train.spec import Spec

VERSION = 1
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"
STATE = "state.json"
SHARDS = "shards"
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


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What the optimizer moves and what it remembers, by name."""

    trained: dict[str, Any]
    moments: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for part in (self.trained, self.moments) for tensor in part.values())

    def copied(self) -> "Tensors":
        """In the machine's memory, where no later step touches them."""
        return Tensors(trained=_copies(self.trained), moments=_copies(self.moments))


def set_aside(model: CausalModel, optimizer: Any) -> Tensors:
    return Tensors(trained=model.trainable, moments=optimizer_tensors(optimizer, model.trainable))


def save_checkpoint(
    root: Path,
    position: Position,
    identity: Identity,
    model: CausalModel,
    tensors: Tensors,
    spec: Spec,
    *,
    learning_rate: float,
    asked: bool,
    attached: Mapping[str, Path] | None = None,
    group: Group = ALONE,
) -> Callable[[], SavedCheckpoint]:
    """Takes down every number but `tensors` now; what it returns writes the files, at once or beside the next steps if the tensors
    are copies. The processes call it together and the leading one commits. Sharded weights stay shards where all processes see
    one folder; over several machines they are gathered. `attached` files are copied in by name."""
    path = root / _NAME.format(position.step)
    trained, moments = tensors.trained, tensors.moments
    in_shards = group.sharded and group.nodes == 1
    if group.sharded and not in_shards:
        trained, moments = whole(trained, keep=group.leads), whole(moments, keep=group.leads)
    if not group.leads:

        def take_part() -> SavedCheckpoint:
            if in_shards:
                group.wait()
                save_shards(unfinished_path(path) / SHARDS, trained, moments)
            return SavedCheckpoint(path=path, files=[], manifest_sha256="")

        return take_part
    state = {
        "version": VERSION,
        "asked": asked,
        "position": asdict(position),
        "identity": asdict(identity),
        "machine": machine_of(spec, group, model),
        "schedule": {"step": position.step, "learning_rate": learning_rate},
        "random": _python_and_numpy_states(),
    }
    states = torch_states()

    def write(folder: Path) -> None:
        if in_shards:
            # The folder is there now, for the others, too.
            group.wait()
            save_shards(folder / SHARDS, trained, moments)
        else:
            write_trained_weights(model, spec, folder, trained)
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in moments.items()}
            save_file(stored, folder / OPTIMIZER)
        for name, file in (attached or {}).items():
            shutil.copyfile(file, folder / name)
        save_file(states, folder / RANDOM)
        (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")

    def commit() -> SavedCheckpoint:
        files = commit_folder(path, write, {"step": position.step, "asked": asked})
        return SavedCheckpoint(path=path, files=files, manifest_sha256=sha256_file(path / "manifest.json"))

    return commit


def machine_of(spec: Spec, group: Group, model: CausalModel) -> dict[str, Any]:
    """What the last bits of the sums depend on."""
    machine = {
        "device": spec.device.split(":")[0],
        "threads": spec.threads,
        "processes": group.size,
        "torch": str(torch.__version__),
    }
    return machine | ({"kernels": list(model.kernels)} if model.kernels else {})


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
    path: Path, identity: Identity, model: CausalModel, optimizer: Any, spec: Spec, group: Group = ALONE
) -> tuple[Position, dict[str, Any]]:
    """Puts every state back; returns the position and the machine that wrote it. Raises Failure: MODEL_INVALID for another
    base, TRAINING_INPUT_INVALID for another spec or dataset, DATA_CORRUPT for torn files."""
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


def _copies(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


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
    restore_torch_states(tensors)
