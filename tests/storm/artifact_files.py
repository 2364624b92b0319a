"""Which files of the artifact store nobody knows: no file, model, checkpoint, archive of events or due removal.

Not pure: databases, the folder of the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from finemesh.artifacts.v1 import artifact_pb2
from tests.storm.storm_mesh import StormMesh

SHOWN_MAX = 5


async def unknown_files(mesh: StormMesh) -> AsyncIterator[str]:
    """One line for each kind: `jobs`, `files`, `models`, `base`."""
    known = await _known(mesh)
    unknown: dict[str, list[str]] = {}
    root = mesh.stack.folder.artifacts
    for path in sorted(root.rglob("*")):
        key = path.relative_to(root).as_posix()
        if path.is_file() and key not in known:
            unknown.setdefault(key.partition("/")[0], []).append(key)
    for kind, keys in unknown.items():
        yield f"{len(keys)} files under {kind}/ that nobody knows: {'; '.join(keys[:SHOWN_MAX])}"


async def _known(mesh: StormMesh) -> set[str]:
    known = set()
    for row in await mesh.rows("gateway", "SELECT project_id, file_id FROM files WHERE delete_time IS NULL"):
        known.add(f"files/{row['project_id']}/{row['file_id']}")
    for row in await mesh.rows("gateway", "SELECT artifact_key FROM removals"):
        known.add(row["artifact_key"])
    for row in await mesh.rows("scheduler", "SELECT artifact FROM checkpoints WHERE obsolete_at IS NULL"):
        artifact = artifact_pb2.Artifact.FromString(row["artifact"])
        known |= {artifact.key + file.path for file in artifact.files}
    for row in await mesh.rows("scheduler", "SELECT output_artifact FROM jobs WHERE output_artifact IS NOT NULL"):
        artifact = artifact_pb2.Artifact.FromString(row["output_artifact"])
        known |= {artifact.key + file.path for file in artifact.files}
    for row in await mesh.rows("billing", "SELECT object_key FROM archive_files WHERE removed_time IS NULL"):
        known.add(row["object_key"])
    for table in ("base_models", "models"):
        statement = f"SELECT artifact_key || (file ->> 'path') AS key FROM {table}, jsonb_array_elements(files) AS file"  # noqa: S608 - names of tables
        known |= {row["key"] for row in await mesh.rows("inference", statement)}
    return known
