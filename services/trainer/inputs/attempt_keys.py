"""Which keys of the artifact store an attempt and an analysis may name. Not pure: protobuf.

An attempt reads base models, files of its project, and what jobs of its project stored; it writes below its own job.
What an assignment names beyond that is refused before anything is read, whoever wrote it.
"""

from chassis.errors import invalid
from chassis.names import parse_name
from chassis.objects.object_keys import checked_path
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2

# The rooms of the artifact store that a trainer knows; deploy/local/table.py says who may do what in which.
BASES = "base/"
FILES = "files/"
JOBS = "jobs/"


def check_assignment(assignment: node_pb2.Assignment) -> None:
    """InvalidArgument with the field whose key is none of this attempt's."""
    project, job = _owner(assignment.lease.tuning_job, "lease.tuning_job")
    own = f"{JOBS}{project}/{job}/"
    check_base(assignment.base_model)
    _require("training_file", assignment.training_file, f"{FILES}{project}/")
    if assignment.HasField("validation_file"):
        _require("validation_file", assignment.validation_file, f"{FILES}{project}/")
    _require_exactly("checkpoint_key_prefix", assignment.checkpoint_key_prefix, f"{own}checkpoints/")
    _require_exactly("model_key_prefix", assignment.model_key_prefix, f"{own}models/")
    if assignment.HasField("resume_from"):
        _require("resume_from.artifact", assignment.resume_from.artifact, f"{own}checkpoints/")
    if assignment.HasField("start_from") and not assignment.start_from.HasField("hub"):
        _check_start(assignment.start_from, project)


def check_base(base: artifact_pb2.Artifact) -> None:
    _require("base_model", base, BASES)


def check_dataset(dataset: artifact_pb2.Artifact, project: str) -> None:
    """`project` is empty where the scheduler asks for nobody in particular."""
    _require("dataset", dataset, f"{FILES}{project}/" if project else FILES)


def _check_start(start: node_pb2.StartWeights, project: str) -> None:
    """Weights of an earlier job are of the same project: no other's can be named in a spec."""
    origin_project, origin = _owner(start.tuning_job, "start_from.tuning_job")
    if origin_project != project:
        raise invalid("start_from.tuning_job", f"must be a job of {project}")
    _require("start_from.artifact", start.artifact, f"{JOBS}{project}/{origin}/")


def _owner(name: str, field: str) -> tuple[str, str]:
    parts = parse_name(tuning_job_pb2.TuningJob, name, field)
    return parts["project"], parts["tuning_job"]


def _require(field: str, artifact: artifact_pb2.Artifact, prefix: str) -> None:
    # A key that climbs out of its prefix begins with it, too.
    key = checked_path(artifact.key.removesuffix("/"))
    if not f"{key}/".startswith(prefix):
        raise invalid(
            f"{field}.key",
            f"must begin with {prefix}",
            message=f"{field}.key must begin with {prefix}, and is {artifact.key[:200]!r}",
        )


def _require_exactly(field: str, given: str, wanted: str) -> None:
    if given != wanted:
        raise invalid(field, f"must be {wanted}", message=f"{field} must be {wanted}, and is {given[:200]!r}")
