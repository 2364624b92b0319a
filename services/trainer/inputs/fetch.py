"""Fetches the inputs of an attempt, verified, into its work folder. Not pure: files, the artifact store, programs.

It knows which files of a base model are safe to read: weights as safetensors, never pickles.
"""

from pathlib import Path

import structlog

from chassis.clock import Clock
from chassis.errors import DataLoss, Unavailable
from chassis.objects.transfer import FileTransfer
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from formats.manifests import MANIFEST
from services.trainer.artifacts.convert import digests_from_proto
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.config import TrainerSettings
from services.trainer.inputs.convert import kind_from_proto
from services.trainer.integrations.fetched_secrets import FetchedSecrets
from services.trainer.integrations.hub.repository import PulledWeights, Repository, pull
from services.trainer.integrations.programs import HOME

log = structlog.get_logger()

# The `cause` in a failure's details, also in those that the child tells.
BAD_CHECKPOINT = "bad_checkpoint"
BASE = "inputs/base"
START = "inputs/start"
# In a checkpoint: the names and digests of its other files.
# An adapter of a large rank may be more than a very small base.
START_BYTES_MIN = 256 * 1024**2
# What a checkpoint holds for its own run alone.
_OWN_STATE = ("optimizer.", "rng.", "reference.", "best_", MANIFEST)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (*_PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


def is_safe(path: str) -> bool:
    """Whether training may read this file of a base model."""
    return not path.lower().endswith(_PICKLES)


def is_no_weight(path: str) -> bool:
    """Whether rendering and tokenising may need this file of a base model."""
    return not path.lower().endswith(_WEIGHTS)


def is_start_weight(path: str) -> bool:
    """Whether a run that continues an earlier one may need this file of its checkpoint or model."""
    return is_safe(path) and not path.startswith(_OWN_STATE)


def start_bytes_max(base: artifact_pb2.Artifact) -> int:
    """Weights of the same shape may be stored in wider numbers: four bytes where the base has two or one."""
    weights = sum(file.size_bytes for file in base.files if is_safe(file.path) and not is_no_weight(file.path))
    return max(4 * weights, START_BYTES_MIN)


async def fetch_inputs(
    assignment: node_pb2.Assignment, folder: Path, *, cache: FileCache, store: FileTransfer
) -> dict[str, str | None]:
    """Paths below `folder`, by their names in `Placement`."""
    await cache.place(
        assignment.base_model.key, digests_from_proto(assignment.base_model), folder / BASE, wanted=is_safe
    )
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
        await cache.place(weights.key, digests_from_proto(weights), folder / START, wanted=is_start_weight)
    return {"train_file": train_file, "validation_file": validation_file, "resume_from": resume_from}


async def fetch_hub_start(
    assignment: node_pb2.Assignment, folder: Path, secrets: FetchedSecrets, settings: TrainerSettings, clock: Clock
) -> PulledWeights | None:
    """The weights that a run starts from, when they lie in the hub. DomainError when there is no run without them."""
    start = assignment.start_from
    if not start.HasField("hub"):
        return None
    known = await secrets.get()
    if known is None:
        raise Unavailable("DEPENDENCY_UNAVAILABLE", "the job's secrets cannot be had")
    source = Repository(
        endpoint=settings.hub_endpoint,
        name=start.hub.repository,
        token=known.hub_token,
        seconds_max=settings.hub_pull_s_max,
        attempts_max=settings.hub_pull_attempts_max,
    )
    return await pull(
        source,
        start.hub.revision,
        folder / START,
        kind=kind_from_proto(assignment.spec),
        bytes_max=start_bytes_max(assignment.base_model),
        home=folder / HOME,
        clock=clock,
    )


async def fetch_file(artifact: artifact_pb2.Artifact, folder: Path, below: str, cache: FileCache) -> str:
    """The path below `folder` of an artifact that is one file."""
    files = digests_from_proto(artifact)
    if len(files) != 1:
        raise DataLoss("DATA_CORRUPT", f"{artifact.key} should be one file and is {len(files)}")
    await cache.place(artifact.key, files, folder / below)
    return f"{below}/{files[0].path or artifact.key.rpartition('/')[2]}"


async def _fetch_checkpoint(checkpoint: node_pb2.CheckpointManifest, folder: Path, store: FileTransfer) -> None:
    """DataLoss with BAD_CHECKPOINT as its cause when the files are not those that were committed."""
    files = digests_from_proto(checkpoint.artifact)
    digests = {file.path: file.sha256 for file in files}
    if digests.get(MANIFEST) != checkpoint.manifest_sha256:
        raise _bad_checkpoint(f"the checkpoint at step {checkpoint.step} is not the one that was committed")
    try:
        await store.download_all(checkpoint.artifact.key, files, folder)
    except DataLoss as error:
        # A checkpoint is given up for good: a second look tells torn files from a fault on the way.
        log.warning("checkpoint_read_again", step=checkpoint.step, error=str(error))
        try:
            await store.download_all(checkpoint.artifact.key, files, folder)
        except DataLoss as again:
            raise _bad_checkpoint(again.message) from again


def _bad_checkpoint(message: str) -> DataLoss:
    return DataLoss("DATA_CORRUPT", message, metadata={"cause": BAD_CHECKPOINT})
