"""Writes checkpoints: all that a run needs to go on as if nothing had happened, in a folder whole or absent.

That is the weights, the optimizer, every random state, the position in the schedule, the digests of the settings and of
the packed data, and the counts that are metered, as safetensors and JSON. It knows no store and no lease; the agent
carries the folders away.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from formats.manifests import MANIFEST, FileDigest
from services.trainer.train.checkpoint.manifest import (
    FOLDER_NAME,
    OPTIMIZER,
    RANDOM,
    SHARDS,
    STATE,
    VERSION,
)
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.checkpoint.random_states import torch_states
from services.trainer.train.data.run_inputs import Identity
from services.trainer.train.disk.durable import (
    commit_folder,
    remove_folder,
    sha256_file,
    unfinished_path,
)
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.fsdp import save_shards, whole
from services.trainer.train.modeling.optimizer import optimizer_tensors
from services.trainer.train.modeling.trained_weights import write_adapter_config, write_trained_weights
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.spec import Spec


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    path: Path
    files: list[FileDigest]
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The trained weights and the optimizer's moments, by name."""

    trained: dict[str, Any]
    moments: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for part in (self.trained, self.moments) for tensor in part.values())

    def copied(self) -> "Tensors":
        """Copies in the machine's memory, where no later step changes them."""
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
    machine: Mapping[str, Any],
    learning_rate: float,
    asked: bool,
    attached: Mapping[str, Path] | None = None,
    group: Group = ALONE,
) -> Callable[[], SavedCheckpoint]:
    """Takes every number but `tensors` now. The function that it returns writes the files: at once, or beside the next
    steps if the tensors are copies. All processes call both together, and the leading one commits. Sharded weights stay
    shards where all processes see one folder; over several machines they are gathered. `attached` files are copied in
    by name."""
    path = root / FOLDER_NAME.format(position.step)
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
        "machine": dict(machine),
        "schedule": {"step": position.step, "learning_rate": learning_rate},
        "random": _python_and_numpy_states(),
    }
    states = torch_states()

    def write(folder: Path) -> None:
        if in_shards:
            # The folder is there now, for the others, too.
            group.wait()
            save_shards(folder / SHARDS, trained, moments)
            if spec.training.type == "lora":
                # A run that starts from them reads here what shards do not show: the scales.
                write_adapter_config(model, folder)
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
        return SavedCheckpoint(path=path, files=files, manifest_sha256=sha256_file(path / MANIFEST))

    return commit


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` safety checkpoints; those that the user asked for stay."""
    safety = [path for path in sorted(root.glob("step-*")) if not _asked(path)]
    for path in safety[:-keep_last]:
        remove_folder(path)


def _asked(path: Path) -> bool:
    """An unreadable one counts as a safety checkpoint: it ages out with them."""
    try:
        return bool(json.loads((path / MANIFEST).read_bytes())["asked"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _copies(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _python_and_numpy_states() -> dict[str, Any]:
    # The engine draws from neither; a library that it calls might.
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
