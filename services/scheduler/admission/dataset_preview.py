"""Not pure: gRPC. Rows of a dataset as a training would see them.

Names are resolved here, rows are rendered by a trainer, and nothing is kept.
"""

import asyncio

from chassis.errors import FieldViolation, InvalidArgument
from chassis.identity import Caller
from chassis.names import own_name
from finemesh.artifacts.v1 import file_artifact_service_pb2, model_artifact_service_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.files.v1 import dataset_preview_pb2, file_pb2
from finemesh.tuning.v1 import tuning_service_pb2
from services.scheduler.admission.peer_errors import ask_about
from services.scheduler.admission.quotes_in_line import QuotesInLine
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.nodes.trainers import first_answer
from services.scheduler.peers import Peers
from services.scheduler.spec.convert import base_facts_from_proto, train_on_inputs_from_proto
from services.scheduler.spec.tuning_limits import LimitsTable
from services.scheduler.spec.tuning_spec import SEQUENCE_TOKENS_MAX, SEQUENCE_TOKENS_MIN, TrainOnInputs

ROWS_MAX = 50
TOKENS_SHOWN_MAX = 8192


class Previewer:
    def __init__(
        self,
        database: Database,
        peers: Peers,
        limits: LimitsTable,
        quotes: QuotesInLine,
        settings: SchedulerSettings,
    ) -> None:
        self._database = database
        self._peers = peers
        self._quotes = quotes
        self._limits = limits
        self._settings = settings

    async def preview(
        self, request: tuning_service_pb2.PreviewDatasetRequest, caller: Caller
    ) -> dataset_preview_pb2.DatasetPreview:
        """Raises InvalidArgument with every violation, the refusal of the file, the model or the data, Unavailable
        while no trainer answers, or ResourceExhausted for one too many of this key."""
        train_on_inputs = _check(request)
        own_name(file_pb2.File, request.file, caller, "file")
        base, file = await asyncio.gather(
            ask_about(
                "base_model",
                self._peers.models.ResolveBaseModel(
                    model_artifact_service_pb2.ResolveBaseModelRequest(model_id=request.base_model)
                ),
            ),
            ask_about(
                "file", self._peers.files.ResolveFile(file_artifact_service_pb2.ResolveFileRequest(name=request.file))
            ),
        )
        limits = self._limits.of(request.base_model, base_facts_from_proto(base))
        # Whether the rows are preferences is known only where they are read.
        tokens_max = max(limits.sequence_tokens_max, limits.sequence_tokens_max_dpo)
        if request.sequence_tokens_max > tokens_max:
            rule = f"must be at most {tokens_max}, the limit of {request.base_model}, not {request.sequence_tokens_max}"
            raise _refusal([FieldViolation("sequence_tokens_max", rule)])
        wanted = dataset_service_pb2.PreviewDatasetRequest(
            dataset=file.artifact,
            base_model=base.artifact,
            # Left out, as a job fills it in: a preview cuts nothing that the job would train.
            sequence_tokens_max=request.sequence_tokens_max or limits.sequence_tokens_max,
            train_on_inputs=train_on_inputs.value,
            row_count_max=request.row_count_max,
            tokens_shown_max=request.tokens_shown_max,
        )
        timeout_s = self._settings.analysis_deadline_s
        async with self._quotes.place(caller):
            answer = await first_answer(
                self._database, self._peers, lambda trainer: trainer.PreviewDataset(wanted, timeout=timeout_s)
            )
        return answer.preview


def _check(request: tuning_service_pb2.PreviewDatasetRequest) -> TrainOnInputs:
    violations = []
    if not request.base_model:
        violations.append(FieldViolation("base_model", "give the id of a base model"))
    train_on_inputs = train_on_inputs_from_proto(request.train_on_inputs)
    if train_on_inputs is None:
        violations.append(FieldViolation("train_on_inputs", "must be AUTO, TRUE or FALSE"))
    for field, value, least, most in (
        ("row_count_max", request.row_count_max, 1, ROWS_MAX),
        ("tokens_shown_max", request.tokens_shown_max, 1, TOKENS_SHOWN_MAX),
        ("sequence_tokens_max", request.sequence_tokens_max, SEQUENCE_TOKENS_MIN, SEQUENCE_TOKENS_MAX),
    ):
        if value and not least <= value <= most:
            violations.append(FieldViolation(field, f"must be {least} to {most}, or 0 for the default, not {value}"))
    if violations or train_on_inputs is None:
        raise _refusal(violations)
    return train_on_inputs


def _refusal(violations: list[FieldViolation]) -> InvalidArgument:
    names = ", ".join(violation.field for violation in violations)
    return InvalidArgument("INVALID_FIELD", f"the request is not valid: {names}", violations=violations)
