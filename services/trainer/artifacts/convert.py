"""The files of an artifact as protobuf and back."""

from collections.abc import Sequence

from finemesh.artifacts.v1 import artifact_pb2
from services.trainer.artifacts.transfer import StoredFile


def artifact_to_proto(key: str, files: Sequence[StoredFile]) -> artifact_pb2.Artifact:
    entries = [artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in files]
    return artifact_pb2.Artifact(key=key, files=entries)


def stored_files_from_proto(artifact: artifact_pb2.Artifact) -> list[StoredFile]:
    return [StoredFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in artifact.files]
