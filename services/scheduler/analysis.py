"""Token counts of a job's dataset: from the table when the same code analysed the file before, else from a trainer.

A quote, the hold and the run all rest on the same row, so they cannot disagree. It prices nothing.
"""

from dataclasses import dataclass

import structlog

from chassis.errors import FieldViolation, InvalidArgument
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.config import SchedulerSettings
from services.scheduler.node_store import preparation_version
from services.scheduler.peers import Peers
from services.scheduler.spec import TrainOnInputs, TuningSpec
from services.scheduler.store import QUERIES, Store
from services.scheduler.trainers import first_answer

ANALYZERS_ASKED_MAX = 5
PREFERENCE = "preference"
log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a job reads: its base model and its files."""

    base_model: artifact_pb2.Artifact
    base_revision: str
    training_file: artifact_pb2.Artifact
    validation_file: artifact_pb2.Artifact | None


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """One file under one base model and setting."""

    example_count: int
    token_count: int
    labelled_token_count: int
    truncated_count: int
    longest_tokens: int
    plan_sha256: str
    format: str
    preparation_version: str
    rows_per_second: float


class Analyzer:
    def __init__(self, store: Store, peers: Peers, settings: SchedulerSettings) -> None:
        self._store = store
        self._peers = peers
        self._settings = settings

    async def counts(self, spec: TuningSpec, inputs: Inputs) -> tuning_job_pb2.DatasetCounts:
        """`spec` is complete. Raises the trainer's refusal of the data, or Unavailable while no trainer answers."""
        training = await self._file_counts(spec, inputs, inputs.training_file)
        _require_format(spec, "training_file", training)
        validation = None
        if inputs.validation_file is not None:
            validation = await self._file_counts(spec, inputs, inputs.validation_file)
            _require_format(spec, "validation_file", validation)
        return tuning_job_pb2.DatasetCounts(
            training_examples=training.example_count,
            training_tokens=training.token_count,
            validation_examples=validation.example_count if validation else 0,
            validation_tokens=validation.token_count if validation else 0,
            truncated_examples=training.truncated_count,
            rows_per_second=training.rows_per_second,
        )

    async def _file_counts(self, spec: TuningSpec, inputs: Inputs, file: artifact_pb2.Artifact) -> FileCounts:
        train_on_inputs = (spec.train_on_inputs or TrainOnInputs.AUTO).value
        key = {
            "file_sha256": file.files[0].sha256,
            "base_revision": inputs.base_revision,
            "sequence_tokens_max": spec.hyperparameters.sequence_tokens_max,
            "train_on_inputs": train_on_inputs,
        }
        version = await preparation_version(self._store.pool)
        row = await QUERIES.get_analysis(self._store.pool, **key, preparation_version=version)
        if row is None:
            request = dataset_service_pb2.AnalyzeDatasetRequest(
                dataset=file,
                base_model=inputs.base_model,
                base_revision=inputs.base_revision,
                sequence_tokens_max=spec.hyperparameters.sequence_tokens_max,
                train_on_inputs=train_on_inputs,
            )
            fresh = await self._ask(request)
            await QUERIES.insert_analysis(self._store.pool, **key, **vars(fresh), now=self._store.now())
            # Another worker may have been first; then its row is the one that everybody reads.
            row = await QUERIES.get_analysis(self._store.pool, **key, preparation_version=fresh.preparation_version)
        return FileCounts(**row)

    async def _ask(self, request: dataset_service_pb2.AnalyzeDatasetRequest) -> FileCounts:
        timeout_s = self._settings.analysis_deadline_s
        answer = await first_answer(
            self._store, self._peers, lambda trainer: trainer.AnalyzeDataset(request, timeout=timeout_s)
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
        )


def _require_format(spec: TuningSpec, field: str, counts: FileCounts) -> None:
    """Preferences teach by comparison, everything else by example; a file is for one of the two."""
    if (counts.format == PREFERENCE) == (spec.dpo is not None):
        return
    wanted = (
        "rows of preferences, which the method dpo learns from" if spec.dpo is not None else "no preferences; use dpo"
    )
    raise InvalidArgument(
        "DATASET_INVALID",
        f"spec.{field} has rows of the {counts.format} format, and this method takes {wanted}",
        violations=[FieldViolation(f"spec.{field}", f"must have {wanted}; its format is {counts.format}")],
    )
