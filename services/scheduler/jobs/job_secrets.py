"""Not pure: database, protobuf. The secrets of jobs: sealed while the job lives, told to the holder of its lease.

It decides nothing about jobs. The transaction that ends a job deletes its secrets (JobTransitions.end).
"""

import structlog

from chassis.db.pool import Connection
from chassis.errors import Aborted, FailedPrecondition, FieldViolation
from finemesh.tuning.v1 import tuning_secrets_pb2
from services.scheduler.database import Database
from services.scheduler.jobs.convert import job_name
from services.scheduler.jobs.job import JobRef, LeaseRef
from services.scheduler.jobs.secret_box import SecretBox
from services.scheduler.jobs.store import JobStore
from services.scheduler.spec.integrations import ProvidedSecrets

log = structlog.get_logger(__name__)


class JobSecrets:
    """Without a box (no key is set) a job with secrets is refused."""

    def __init__(self, database: Database, box: SecretBox | None) -> None:
        self._database = database
        self._box = box

    def require(self) -> None:
        """Before anything is stored of a job that brings secrets."""
        if self._box is None:
            description = "this mesh keeps no secrets: its operator has to set FINEMESH_SCHEDULER_SECRETS_KEY"
            raise FailedPrecondition(
                "NOT_OFFERED", f"secrets: {description}", violations=[FieldViolation("secrets", description)]
            )

    async def keep(self, connection: Connection, ref: JobRef, provided: ProvidedSecrets) -> None:
        """In the transaction that creates the job."""
        if provided.is_empty:
            return
        self.require()
        assert self._box is not None
        message = tuning_secrets_pb2.TuningSecrets(wandb_api_key=provided.wandb_api_key, hub_token=provided.hub_token)
        sealed = self._box.seal(message.SerializeToString(), job_name(ref))
        await JobStore(connection).insert_secrets(ref, sealed, self._database.now())

    async def fetch(self, ref: LeaseRef) -> tuning_secrets_pb2.TuningSecrets:
        """Aborted for a lease that is not in force. Empty when there are none, or when the key has changed since."""
        row = await JobStore(self._database.pool).get_secrets(ref)
        if row is None:
            raise Aborted(
                "LEASE_STALE", f"lease {ref.lease_token} is not in force", metadata={"token": str(ref.lease_token)}
            )
        found = tuning_secrets_pb2.TuningSecrets()
        (sealed,) = row
        if sealed is None:
            return found
        name = job_name(ref)
        plain = self._box.open(sealed, name) if self._box is not None else None
        if plain is None:
            log.error("job_secrets_not_opened", tuning_job=name, detail="they were sealed with another key")
            return found
        found.MergeFromString(plain)
        return found
