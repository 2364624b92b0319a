"""Not pure: database, gRPC. Asks trainers, one after another, while they do not answer.

What one of them refuses, all would refuse. It knows no dataset.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from chassis.errors import DomainError, Unavailable, is_away
from services.scheduler.database import Database
from services.scheduler.nodes.store import NodeStore
from services.scheduler.peers import DatasetStub, Peers

ANALYZERS_ASKED_MAX = 5
Answer = TypeVar("Answer")
log = structlog.get_logger(__name__)


async def first_answer(database: Database, peers: Peers, call: Callable[[DatasetStub], Awaitable[Answer]]) -> Answer:
    """Raises the refusal of a trainer, or what the last one failed with, or Unavailable while none is registered."""
    last: DomainError = Unavailable(
        "DEPENDENCY_UNAVAILABLE", "no trainer is registered to analyse the dataset; one has to join first"
    )
    for address in await NodeStore(database.pool).list_analyzers(ANALYZERS_ASKED_MAX):
        try:
            return await call(peers.datasets(address))
        except DomainError as error:
            if not is_away(error):
                raise
            log.warning("trainer_did_not_answer", address=address, error=str(error))
            last = error
        finally:
            peers.prune()
    raise last
