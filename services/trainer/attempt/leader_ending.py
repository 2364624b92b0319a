"""How a leading node's attempt ends, by what its child told last. Not pure: the artifact store.

A model counts only when all its files are stored. It starts and ends no process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chassis.objects.transfer import FileTransfer
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from formats.manifests import FileDigest, revision_of
from services.trainer.artifacts.convert import artifact_to_proto
from services.trainer.attempt import convert
from services.trainer.attempt.child_events import own_folder
from services.trainer.attempt.reporter import AttemptOver, Ending
from services.trainer.child.training_child import ChildProtocolError, Event
from services.trainer.inputs.convert import kind_from_proto


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """The exported model, in `folder` of this node and under `key` in the artifact store."""

    folder: Path
    key: str
    files: tuple[FileDigest, ...]
    revision: str
    lineage: Mapping[str, str]


def is_final(last: Event | None, *, is_cancelled: bool) -> bool:
    """Whether the job ends with this attempt although it did not finish."""
    if last is None:
        return False
    return (last["type"] == "stopped" and is_cancelled) or (last["type"] == "failed" and last["kind"] == "user")


def unfinished(last: Event | None, *, step: int, exit_code: int, last_words: str, is_cancelled: bool) -> Ending:
    """The ending of a run that did not finish. `step` is the last one that was reported."""
    if last is not None and last["type"] == "failed":
        return convert.failed_event_to_proto(last)
    if is_cancelled:
        return node_service_pb2.AttemptStopped(step=int(last["step"]) if last is not None else step)
    if last is not None:
        return convert.platform_fault_to_proto("the training process was stopped from outside")
    return convert.exit_to_proto(exit_code, last_words)


async def upload_model(
    exported: Event | None, assignment: node_pb2.Assignment, folder: Path, store: FileTransfer
) -> StoredModel:
    """AttemptOver when the export is not what it claims to be."""
    if exported is None:
        raise ChildProtocolError("the child finished without an export")
    files, revision = convert.digests_from_event(exported), str(exported["revision"])
    if revision_of(files) != revision:
        raise AttemptOver(convert.platform_fault_to_proto("the export's revision does not match its files"))
    model = StoredModel(
        folder=own_folder(folder, exported["path"]),
        key=f"{assignment.model_key_prefix}{revision}/",
        files=tuple(files),
        revision=revision,
        lineage=convert.lineage_from_event(exported),
    )
    await store.upload_all(model.folder, model.key, model.files)
    return model


def succeeded(finished: Event, model: StoredModel, spec: tuning.TuningSpec, pushed: Mapping[str, str]) -> Ending:
    """`pushed` is what the lineage says of a push to the hub."""
    kind = kind_from_proto(spec)
    return node_service_pb2.AttemptSucceeded(
        model=artifact_to_proto(model.key, model.files),
        revision=model.revision,
        kind=kind,
        adapter_rank=spec.lora.rank if kind == "adapter" else 0,
        lineage={**model.lineage, **pushed},
        step=int(finished.get("step") or finished["total_steps"]),
        stopped_early=bool(finished.get("stopped_early")),
    )
