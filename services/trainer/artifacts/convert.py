"""The files of an artifact as protobuf and back."""

from collections.abc import Sequence

from finemesh.artifacts.v1 import artifact_pb2
from formats.manifests import FileDigest


def artifact_to_proto(key: str, files: Sequence[FileDigest]) -> artifact_pb2.Artifact:
    entries = [artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in files]
    return artifact_pb2.Artifact(key=key, files=entries)


def digests_from_proto(artifact: artifact_pb2.Artifact) -> list[FileDigest]:
    return [FileDigest(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in artifact.files]
