"""Token counts of a job's dataset: from the table when the file was analysed before, else from a trainer.

A quote, the hold and the run all rest on the same row, so they cannot disagree. It prices nothing.
"""

from dataclasses import dataclass

import structlog

from chassis.errors import Cancelled, DeadlineExceeded, DomainError, Unavailable
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.config import SchedulerSettings
from services.scheduler.node_store import list_analyzers
from services.scheduler.peers import Peers
from services.scheduler.spec import TrainOnInputs, TuningSpec
from services.scheduler.store import QUERIES, Store

ANALYZERS_ASKED_MAX = 5
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


class Analyzer:
    def __init__(self, store: Store, peers: Peers, settings: SchedulerSettings) -> None:
        self._store = store
        self._peers = peers
        self._settings = settings

    async def counts(self, spec: TuningSpec, inputs: Inputs) -> tuning_job_pb2.DatasetCounts:
        """`spec` is complete. Raises the trainer's refusal of the data, or Unavailable while no trainer answers."""
        training = await self._file_counts(spec, inputs, inputs.training_file)
        validation = None
        if inputs.validation_file is not None:
            validation = await self._file_counts(spec, inputs, inputs.validation_file)
        return tuning_job_pb2.DatasetCounts(
            training_examples=training.example_count,
            training_tokens=training.token_count,
            validation_examples=validation.example_count if validation else 0,
            validation_tokens=validation.token_count if validation else 0,
            truncated_examples=training.truncated_count,
        )

    async def _file_counts(self, spec: TuningSpec, inputs: Inputs, file: artifact_pb2.Artifact) -> FileCounts:
        train_on_inputs = (spec.train_on_inputs or TrainOnInputs.AUTO).value
        key = {
            "file_sha256": file.files[0].sha256,
            "base_revision": inputs.base_revision,
            "sequence_tokens_max": spec.hyperparameters.sequence_tokens_max,
            "train_on_inputs": train_on_inputs,
        }
        row = await QUERIES.get_analysis(self._store.pool, **key)
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
            row = await QUERIES.get_analysis(self._store.pool, **key)
        return FileCounts(**row)

    async def _ask(self, request: dataset_service_pb2.AnalyzeDatasetRequest) -> FileCounts:
        """Asks one trainer after another while they do not answer; what one of them refuses, all would refuse."""
        last: DomainError = Unavailable(
            "DEPENDENCY_UNAVAILABLE", "no trainer is registered to analyse the dataset; one has to join first"
        )
        for address in await list_analyzers(self._store.pool, ANALYZERS_ASKED_MAX):
            try:
                answer = await self._peers.datasets(address).AnalyzeDataset(
                    request, timeout=self._settings.analysis_deadline_s
                )
            except (Unavailable, DeadlineExceeded, Cancelled) as error:
                log.warning("trainer did not analyse", address=address, error=str(error))
                last = error
                continue
            finally:
                await self._peers.prune()
            return FileCounts(
                example_count=answer.example_count,
                token_count=answer.token_count,
                labelled_token_count=answer.labelled_token_count,
                truncated_count=answer.truncated_count,
                longest_tokens=answer.longest_tokens,
                plan_sha256=answer.plan_sha256,
                format=answer.format,
            )
        raise last
