"""Not pure: database, gRPC. Token counts of a job's dataset.

They come from the table when the same code analysed the file before, else from a trainer. A quote, the hold and the run
all rest on the same row, so they cannot disagree. It prices nothing.
"""

from contextlib import nullcontext
from dataclasses import dataclass

from chassis.errors import invalid
from chassis.identity import Caller, acting_as
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.admission.quotes_in_line import QuotesInLine
from services.scheduler.admission.store import AdmissionStore, CountsKey, FileCounts
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.nodes.store import NodeStore
from services.scheduler.nodes.trainers import first_answer
from services.scheduler.peers import Peers
from services.scheduler.spec.tuning_methods import method_of_format, name_of
from services.scheduler.spec.tuning_spec import TrainOnInputs, TuningSpec


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a job reads: its base model and its files."""

    base_model: artifact_pb2.Artifact
    base_revision: str
    training_file: artifact_pb2.Artifact
    validation_file: artifact_pb2.Artifact | None

    @property
    def dataset_bytes(self) -> int:
        """How much work reading the files is, as bytes."""
        artifacts = [self.training_file, *([self.validation_file] if self.validation_file is not None else [])]
        return sum(max(file.size_bytes, file.work_bytes) for artifact in artifacts for file in artifact.files)


class Analyzer:
    def __init__(self, database: Database, peers: Peers, quotes: QuotesInLine, settings: SchedulerSettings) -> None:
        self._database = database
        self._peers = peers
        self._quotes = quotes
        self._settings = settings

    async def counts(
        self, spec: TuningSpec, inputs: Inputs, caller: Caller, *, for_job: bool
    ) -> tuning_job_pb2.DatasetCounts:
        """`spec` is complete; a trainer serves the callers in turn, and jobs apart from quotes.

        Raises the trainer's refusal of the data, Unavailable while no trainer answers, or ResourceExhausted for a quote
        too many of one key. When the caller goes away, so does what waits for it.
        """
        training = await self._file_counts(spec, inputs, inputs.training_file, caller, for_job=for_job)
        _require_format(spec, "training_file", training)
        validation = None
        if inputs.validation_file is not None:
            validation = await self._file_counts(spec, inputs, inputs.validation_file, caller, for_job=for_job)
            _require_format(spec, "validation_file", validation)
        return tuning_job_pb2.DatasetCounts(
            training_examples=training.example_count,
            training_tokens=training.token_count,
            validation_examples=validation.example_count if validation else 0,
            validation_tokens=validation.token_count if validation else 0,
            truncated_examples=training.truncated_count,
            rows_per_second=training.rows_per_second,
            training_rows=training.row_count,
            training_packed_sequences=training.packed_sequence_count,
        )

    async def _file_counts(
        self, spec: TuningSpec, inputs: Inputs, file: artifact_pb2.Artifact, caller: Caller, *, for_job: bool
    ) -> FileCounts:
        key = CountsKey(
            file_sha256=file.files[0].sha256,
            base_revision=inputs.base_revision,
            sequence_tokens_max=spec.hyperparameters.sequence_tokens_max,
            train_on_inputs=(spec.train_on_inputs or TrainOnInputs.AUTO).value,
        )
        pool = self._database.pool
        known = await AdmissionStore(pool).get_counts(key, await NodeStore(pool).preparation_version())
        if known is not None:
            return known
        request = dataset_service_pb2.AnalyzeDatasetRequest(
            dataset=file,
            base_model=inputs.base_model,
            base_revision=key.base_revision,
            sequence_tokens_max=key.sequence_tokens_max,
            train_on_inputs=key.train_on_inputs,
            purpose=dataset_service_pb2.ANALYSIS_PURPOSE_JOB
            if for_job
            else dataset_service_pb2.ANALYSIS_PURPOSE_UNSPECIFIED,
        )
        async with nullcontext() if for_job else self._quotes.place(caller):
            with acting_as(caller):
                counted = await self._ask(request)
        return await AdmissionStore(pool).insert_counts(key, counted, self._database.now())

    async def _ask(self, request: dataset_service_pb2.AnalyzeDatasetRequest) -> FileCounts:
        timeout_s = self._settings.analysis_deadline_s
        answer = await first_answer(
            self._database, self._peers, lambda trainer: trainer.AnalyzeDataset(request, timeout=timeout_s)
        )
        return FileCounts(
            example_count=answer.example_count,
            token_count=answer.token_count,
            labelled_token_count=answer.labelled_token_count,
            truncated_count=answer.truncated_count,
            longest_tokens=answer.longest_tokens,
            plan_sha256=answer.plan_sha256,
            format=answer.format,
            preparation_version=answer.preparation_version,
            rows_per_second=answer.rows_per_second,
            row_count=answer.row_count,
            packed_sequence_count=answer.packed_sequence_count,
        )


def _require_format(spec: TuningSpec, field: str, counts: FileCounts) -> None:
    """A file is for one method: preferences and feedback have their own, and the others are for supervised tuning."""
    method = name_of(spec.method)
    fitting = method_of_format(counts.format)
    if fitting == method:
        return
    raise invalid(
        f"spec.{field}",
        f"must have rows that the method {method} learns from; its format is {counts.format}: use the method {fitting}",
        message=f"spec.{field} has rows of the {counts.format} format, which the method {fitting} learns from, and the "
        f"method {method} does not",
        reason="DATASET_INVALID",
    )
