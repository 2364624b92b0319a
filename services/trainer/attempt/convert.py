"""Converts what a child told, and how an attempt failed, into the messages of the scheduler.

It decides whose fault a failure is and whether a new attempt may help.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath

from chassis.errors import DomainError, is_disk_full
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from formats.manifests import FileDigest
from services.trainer.child.training_child import Event
from services.trainer.inputs.fetch import BAD_CHECKPOINT

METADATA_ENTRIES_MAX = 20
# Of a warning or of one entry of an error's metadata.
TEXT_CHARS_MAX = 500
# Failures that a new attempt of the same work would meet again.
_DETERMINISTIC = frozenset({"PARITY_FAILED", "NOT_OFFERED", "JOB_TOO_LARGE", "INVALID_FIELD", "MODEL_INVALID"})


def usage_to_proto(kind: str, start: int, end: int, tokens: int) -> node_service_pb2.TrainingUsage:
    return node_service_pb2.TrainingUsage(kind=kind, start_step=start, end_step=end, tokens=tokens)


def digests_from_event(event: Event) -> list[FileDigest]:
    return [
        FileDigest(path=str(entry["path"]), size_bytes=int(entry["size_bytes"]), sha256=str(entry["sha256"]))
        for entry in event["files"]
    ]


def failed_event_to_proto(event: Event) -> node_service_pb2.AttemptFailed:
    """The child told the reason. Faults of the user are never tried again."""
    metadata = {str(entry["field"]): str(entry["description"]) for entry in event.get("violations") or ()}
    metadata |= {str(name): str(value) for name, value in (event.get("details") or {}).items()}
    is_platform = event["kind"] != "user"
    reason = str(event["reason"])
    return _failure_to_proto(
        reason, str(event["message"]), is_platform, is_platform and reason not in _DETERMINISTIC, metadata
    )


def exit_to_proto(exit_code: int, last_words: str) -> node_service_pb2.AttemptFailed:
    """The child was killed, ran out of memory or crashed: the platform's fault, which may be retried."""
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    metadata = {"exit_code": str(exit_code)} | ({"last_words": last_words} if last_words else {})
    return _failure_to_proto("TRAINING_FAILED", f"the training process {how} without a result", True, True, metadata)


def error_to_proto(error: DomainError, *, user_fault: bool = False) -> node_service_pb2.AttemptFailed:
    """The node's own work failed: inputs, store, or settings that no child could run."""
    metadata = dict(error.metadata) | {violation.field: violation.description for violation in error.violations}
    retryable = not user_fault and error.reason not in _DETERMINISTIC
    return _failure_to_proto(error.reason, error.message, not user_fault, retryable, metadata)


def disk_error_to_proto(error: OSError) -> node_service_pb2.AttemptFailed | None:
    """The node has no room for what the attempt needs; elsewhere or later there may be. None for any other error."""
    if not is_disk_full(error):
        return None
    # Whoever reads it owns the job, not the node: what could not be written, and not where.
    what = PurePath(str(error.filename)).name if error.filename else error.strerror
    return platform_fault_to_proto(f"the disk of the node is full: {what}", cause="disk_full")


def name_bad_checkpoint(failed: node_service_pb2.AttemptFailed, checkpoint: node_pb2.CheckpointManifest) -> None:
    """Adds the checkpoint that the attempt could not go on from, so that the next one starts from an earlier one."""
    if failed.error.metadata.get("cause") == BAD_CHECKPOINT:
        failed.bad_checkpoint.step = checkpoint.step
        failed.bad_checkpoint.manifest_sha256 = checkpoint.manifest_sha256


def platform_fault_to_proto(message: str, *, retryable: bool = True, **metadata: str) -> node_service_pb2.AttemptFailed:
    return _failure_to_proto("TRAINING_FAILED", message, True, retryable, metadata)


def lineage_from_event(exported: Event) -> dict[str, str]:
    """The export's lineage and parity report as flat text."""
    flat = {f"parity.{name}": value for name, value in (exported.get("parity") or {}).items()}
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in ({**(exported.get("lineage") or {}), **flat}).items()
    }


def _failure_to_proto(
    reason: str, message: str, platform_fault: bool, retryable: bool, metadata: Mapping[str, str]
) -> node_service_pb2.AttemptFailed:
    entries = list(metadata.items())[:METADATA_ENTRIES_MAX]
    error = tuning.JobError(
        reason=reason,
        message=message[: 2 * TEXT_CHARS_MAX],
        platform_fault=platform_fault,
        metadata={name[:TEXT_CHARS_MAX]: value[:TEXT_CHARS_MAX] for name, value in entries},
    )
    return node_service_pb2.AttemptFailed(error=error, retryable=retryable)
