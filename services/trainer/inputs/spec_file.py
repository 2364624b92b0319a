"""Writes the spec that tells a child what to run and where its inputs are. Not pure: files.

It knows this node's devices and limits; what a setting means is for the engine.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from services.trainer.config import TrainerSettings
from services.trainer.inputs.convert import Placement, child_spec_from_proto
from services.trainer.inputs.fetch import BASE, START
from services.trainer.inputs.parity_program import scorer_of
from services.trainer.integrations.hub.repository import PulledWeights
from services.trainer.node.devices import LocalDevice


def write_spec(
    assignment: node_pb2.Assignment,
    folder: Path,
    inputs: dict[str, str | None],
    devices: Sequence[LocalDevice],
    settings: TrainerSettings,
    pulled: PulledWeights | None = None,
) -> None:
    """`devices` are of one kind; `pulled` is what came from the hub. InvalidArgument when no child could run this."""
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
    document = child_spec_from_proto(assignment, placement)
    (folder / "spec.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def _memory_bytes_of(devices: Sequence[LocalDevice]) -> int | None:
    """None for a CPU: it shares its memory with everything else on the machine, which may also swap."""
    sizes = [device.memory_bytes for device in devices if device.is_gpu]
    return min(sizes) if sizes and min(sizes) > 0 else None


def _digest_of(artifact: artifact_pb2.Artifact) -> str:
    """Over the contents of its files, so that every attempt can show that it starts from the same weights."""
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in artifact.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
