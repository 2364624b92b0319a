"""The secrets of jobs in the database: sealed while the job lives, told to the holder of its lease, gone when it ends.

It decides nothing about jobs; JobStore.end deletes them in the transaction that ends the job.
"""

import structlog

from chassis.db.pool import Connection
from chassis.errors import Aborted, FailedPrecondition, FieldViolation
from finemesh.tuning.v1 import tuning_secrets_pb2
from services.scheduler.convert import job_name
from services.scheduler.domain import JobRef, LeaseRef
from services.scheduler.integrations import Given
from services.scheduler.secret_box import SecretBox
from services.scheduler.store import QUERIES, Store

log = structlog.get_logger(__name__)


class JobSecrets:
    """Without a box (no key is set) a job with secrets is refused."""

    def __init__(self, store: Store, box: SecretBox | None) -> None:
        self._store = store
        self._box = box

    def require(self) -> None:
        """Before anything is stored of a job that brings secrets."""
        if self._box is None:
            description = "this mesh keeps no secrets: its operator has to set FINEMESH_SCHEDULER_SECRETS_KEY"
            raise FailedPrecondition(
                "NOT_OFFERED", f"secrets: {description}", violations=[FieldViolation("secrets", description)]
            )

    async def keep(self, connection: Connection, ref: JobRef, given: Given) -> None:
        """In the transaction that creates the job."""
        if given.is_empty:
            return
        self.require()
        assert self._box is not None
        message = tuning_secrets_pb2.TuningSecrets(wandb_api_key=given.wandb_api_key, hub_token=given.hub_token)
        sealed = self._box.seal(message.SerializeToString(), job_name(ref.project_id, ref.job_id))
        await QUERIES.insert_job_secrets(
            connection, project_id=ref.project_id, job_id=ref.job_id, sealed=sealed, now=self._store.now()
        )

    async def fetch(self, ref: LeaseRef) -> tuning_secrets_pb2.TuningSecrets:
        """Aborted for a lease that is not in force. Empty when there are none, or when the key is another one by now."""
        row = await QUERIES.get_job_secrets(
            self._store.pool, project_id=ref.project_id, job_id=ref.job_id, lease_token=ref.lease_token
        )
        if row is None:
            raise Aborted(
                "LEASE_STALE", f"lease {ref.lease_token} is not in force", metadata={"token": str(ref.lease_token)}
            )
        found = tuning_secrets_pb2.TuningSecrets()
        if row["sealed"] is None:
            return found
        name = job_name(ref.project_id, ref.job_id)
        plain = self._box.open(row["sealed"], name) if self._box is not None else None
        if plain is None:
            log.error("the secrets of a job cannot be opened with this key", job=name)
            return found
        found.MergeFromString(plain)
        return found
