"""The inputs of an attempt, fetched and verified into its work folder, and the spec that tells the child where they are.

It knows which files of a base model are fit to be read: weights as safetensors, never pickles.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from chassis.errors import DataLoss
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from services.trainer.cache import FileCache
from services.trainer.config import TrainerSettings
from services.trainer.devices import LocalDevice
from services.trainer.outside.pulling import Pulled
from services.trainer.parity_program import scorer_of
from services.trainer.spec_map import Placement, child_spec
from services.trainer.transfer import ArtifactStore
from services.trainer.uploads import MANIFEST, stored_files

BASE = "inputs/base"
START = "inputs/start"
# An adapter of a large rank may be more than a very small base.
START_BYTES_MIN = 256 * 1024**2
# What a checkpoint holds for its own run alone.
_OWN_STATE = ("optimizer.", "rng.", "reference.", "best_", "manifest.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (*_PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


def is_sound(path: str) -> bool:
    """Whether training may read this file of a base model."""
    return not path.lower().endswith(_PICKLES)


def is_no_weight(path: str) -> bool:
    """Whether rendering and tokenising may need this file of a base model."""
    return not path.lower().endswith(_WEIGHTS)


def is_start_weight(path: str) -> bool:
    """Whether a run that continues an earlier one may need this file of its checkpoint or model."""
    return is_sound(path) and not path.startswith(_OWN_STATE)


def start_bytes_max(base: artifact_pb2.Artifact) -> int:
    """Weights of the same shape may lie in wider numbers, four bytes where the base has two or one."""
    weights = sum(file.size_bytes for file in base.files if is_sound(file.path) and not is_no_weight(file.path))
    return max(4 * weights, START_BYTES_MIN)


async def fetch_inputs(
    assignment: node_pb2.Assignment, folder: Path, *, cache: FileCache, store: ArtifactStore
) -> dict[str, str | None]:
    """Paths below `folder`, by their names in `Placement`."""
    await cache.place(assignment.base_model.key, stored_files(assignment.base_model), folder / BASE, wanted=is_sound)
    train_file = await fetch_file(assignment.training_file, folder, "inputs/train", cache)
    validation_file = None
    if assignment.HasField("validation_file"):
        validation_file = await fetch_file(assignment.validation_file, folder, "inputs/validation", cache)
    resume_from = None
    if assignment.HasField("resume_from"):
        resume_from = "inputs/resume"
        await _fetch_checkpoint(assignment.resume_from, folder / resume_from, store)
    if assignment.HasField("start_from") and not assignment.start_from.HasField("hub"):
        weights = assignment.start_from.artifact
        await cache.place(weights.key, stored_files(weights), folder / START, wanted=is_start_weight)
    return {"train_file": train_file, "validation_file": validation_file, "resume_from": resume_from}


async def fetch_file(artifact: artifact_pb2.Artifact, folder: Path, below: str, cache: FileCache) -> str:
    """The path below `folder` of an artifact that is one file."""
    files = stored_files(artifact)
    if len(files) != 1:
        raise DataLoss("DATA_CORRUPT", f"{artifact.key} should be one file and is {len(files)}")
    await cache.place(artifact.key, files, folder / below)
    return f"{below}/{files[0].path or artifact.key.rpartition('/')[2]}"


def write_spec(
    assignment: node_pb2.Assignment,
    folder: Path,
    inputs: dict[str, str | None],
    devices: Sequence[LocalDevice],
    settings: TrainerSettings,
    pulled: Pulled | None = None,
) -> None:
    """`devices` are of one kind; `pulled` is what came from the hub. InvalidArgument when no child could run what is asked for."""
    train_file = inputs["train_file"]
    assert train_file is not None
    placement = Placement(
        base_directory=str(folder / BASE),
        train_file=train_file,
        validation_file=inputs["validation_file"],
        resume_from=inputs["resume_from"],
        # The child sees its own GPUs only, whatever their numbers on the node are.
        device="cuda:0" if devices[0].is_gpu else "cpu",
        processes=len(devices),
        device_memory_bytes=_memory_bytes_of(devices),
        threads=settings.threads_per_child,
        micro_batch_tokens=settings.micro_batch_tokens,
        parity_command=scorer_of(settings, devices[0]),
        start_directory=START if assignment.HasField("start_from") else None,
        start_sha256=pulled.sha256 if pulled else _digest_of(assignment.start_from.artifact),
        start_commit=pulled.commit if pulled else "",
        prepared_directory=str(settings.prepared_root.absolute()),
        prepared_bytes_max=settings.prepared_size_bytes_max,
        prepare_workers=settings.threads_per_child * len(devices),
    )
    document = child_spec(assignment, placement)
    (folder / "spec.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def _memory_bytes_of(devices: Sequence[LocalDevice]) -> int | None:
    """None for a CPU: it shares its memory with everything else on the machine, which may also swap."""
    sizes = [device.memory_bytes for device in devices if device.is_gpu]
    return min(sizes) if sizes and min(sizes) > 0 else None


def _digest_of(artifact: artifact_pb2.Artifact) -> str:
    """Of what lies in the files, wherever they lie: every attempt starts from the same weights and says so."""
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in artifact.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


async def _fetch_checkpoint(checkpoint: node_pb2.CheckpointManifest, folder: Path, store: ArtifactStore) -> None:
    files = stored_files(checkpoint.artifact)
    digests = {file.path: file.sha256 for file in files}
    if digests.get(MANIFEST) != checkpoint.manifest_sha256:
        raise DataLoss("DATA_CORRUPT", f"the checkpoint at step {checkpoint.step} is not the one that was committed")
    await store.download_all(checkpoint.artifact.key, files, folder)
