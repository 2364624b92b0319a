"""An attempt names keys of its own job, of its project and of base models; all else is refused with its field."""

from collections.abc import Callable

import pytest

from chassis.errors import InvalidArgument
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from services.trainer.inputs.attempt_keys import check_assignment, check_base, check_dataset

Change = Callable[[node_pb2.Assignment], None]


def assignment() -> node_pb2.Assignment:
    """As the scheduler writes it, with everything that may be in it."""
    made = node_pb2.Assignment(
        checkpoint_key_prefix="jobs/proj_1/ft-1/checkpoints/", model_key_prefix="jobs/proj_1/ft-1/models/"
    )
    made.lease.tuning_job = "projects/proj_1/tuningJobs/ft-1"
    made.base_model.key = "base/ml_1/rv_1/"
    made.training_file.key = "files/proj_1/file-1"
    made.validation_file.key = "files/proj_1/file-2"
    made.resume_from.artifact.key = "jobs/proj_1/ft-1/checkpoints/20-7/"
    made.start_from.tuning_job = "projects/proj_1/tuningJobs/ft-0"
    made.start_from.artifact.key = "jobs/proj_1/ft-0/models/rv_0/"
    return made


def keyed(field: str, key: str) -> Change:
    """The key of the artifact in this field of the assignment."""

    def change(made: node_pb2.Assignment) -> None:
        artifact: artifact_pb2.Artifact | node_pb2.Assignment = made
        for name in field.split("."):
            artifact = getattr(artifact, name)
        assert isinstance(artifact, artifact_pb2.Artifact)
        artifact.key = key

    return change


def prefixed(field: str, prefix: str) -> Change:
    return lambda made: setattr(made, field, prefix)


def started_elsewhere(made: node_pb2.Assignment) -> None:
    made.start_from.tuning_job = "projects/proj_2/tuningJobs/ft-0"


def unnamed(made: node_pb2.Assignment) -> None:
    made.lease.tuning_job = "ft-1"


def test_what_the_scheduler_writes_is_taken() -> None:
    check_assignment(assignment())
    few = assignment()
    for field in ("validation_file", "resume_from", "start_from"):
        few.ClearField(field)
    check_assignment(few)
    few.start_from.hub.repository = "acme/start"
    check_assignment(few)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("base_model.key", keyed("base_model", "archive/usage/")),
        ("base_model.key", keyed("base_model", "based/ml_1/")),
        ("artifact.files.path", keyed("base_model", "base/../archive/usage/")),
        ("artifact.files.path", keyed("base_model", "/base/ml_1/")),
        ("training_file.key", keyed("training_file", "files/proj_2/file-1")),
        ("training_file.key", keyed("training_file", "files/proj_10/file-1")),
        ("artifact.files.path", keyed("training_file", "files/proj_1/../proj_2/file-1")),
        ("validation_file.key", keyed("validation_file", "jobs/proj_1/ft-1/checkpoints/1-1/state.json")),
        ("checkpoint_key_prefix", prefixed("checkpoint_key_prefix", "jobs/proj_2/ft-1/checkpoints/")),
        ("checkpoint_key_prefix", prefixed("checkpoint_key_prefix", "")),
        ("model_key_prefix", prefixed("model_key_prefix", "base/ml_1/")),
        ("model_key_prefix", prefixed("model_key_prefix", "jobs/proj_1/ft-2/models/")),
        ("resume_from.artifact.key", keyed("resume_from.artifact", "jobs/proj_1/ft-2/checkpoints/20-7/")),
        ("start_from.artifact.key", keyed("start_from.artifact", "jobs/proj_2/ft-0/models/rv_0/")),
        ("start_from.tuning_job", started_elsewhere),
        ("lease.tuning_job", unnamed),
    ],
)
def test_a_key_outside_is_refused_with_its_field(field: str, change: Change) -> None:
    made = assignment()
    change(made)
    with pytest.raises(InvalidArgument) as refused:
        check_assignment(made)
    assert [violation.field for violation in refused.value.violations] == [field]


def test_an_analysis_reads_datasets_of_its_project_and_bases() -> None:
    check_base(artifact_pb2.Artifact(key="base/ml_1/rv_1/"))
    mine, other = (artifact_pb2.Artifact(key=f"files/{project}/file-1") for project in ("proj_1", "proj_2"))
    check_dataset(mine, "proj_1")
    # The scheduler asks for itself.
    check_dataset(other, "")
    with pytest.raises(InvalidArgument, match="must begin with files/proj_1/"):
        check_dataset(other, "proj_1")
    with pytest.raises(InvalidArgument, match="must begin with files/"):
        check_dataset(artifact_pb2.Artifact(key="archive/usage/1"), "")
