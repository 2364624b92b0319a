"""Not pure: protobuf. What a job's settings come to on its data, or the refusal of what can never be meant."""

from chassis.errors import InvalidArgument
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.spec.convert import outlook_to_proto, violations_to_errors
from services.scheduler.spec.outlook import DataSize, outlook_of, violations_of_outlook
from services.scheduler.spec.tuning_spec import TuningSpec


def look_ahead(spec: TuningSpec, counts: tuning_job_pb2.DatasetCounts) -> tuning_job_pb2.RunOutlook | None:
    """`spec` is complete. None where an earlier version counted; raises InvalidArgument, before money is held."""
    size = DataSize(
        example_count=counts.training_examples,
        truncated_count=counts.truncated_examples,
        row_count=counts.training_rows,
        packed_count=counts.training_packed_sequences,
    )
    outlook = outlook_of(spec, size)
    if outlook is None:
        return None
    violations = violations_of_outlook(spec, outlook)
    if violations:
        names = ", ".join(violation.field for violation in violations)
        raise InvalidArgument(
            "INVALID_FIELD", f"the spec does not fit its data: {names}", violations=violations_to_errors(violations)
        )
    return outlook_to_proto(outlook)
