"""Asks trainers, one after another, while they do not answer; what one of them refuses, all would refuse. It knows no dataset."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import structlog

from chassis.errors import Cancelled, DeadlineExceeded, DomainError, Unavailable
from services.scheduler.node_store import list_analyzers
from services.scheduler.peers import Peers
from services.scheduler.store import Store

if TYPE_CHECKING:
    from finemesh.datasets.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub

ANALYZERS_ASKED_MAX = 5
Answer = TypeVar("Answer")
log = structlog.get_logger(__name__)


async def first_answer(
    store: Store, peers: Peers, call: Callable[["DatasetServiceAsyncStub"], Awaitable[Answer]]
) -> Answer:
    """Raises the refusal of a trainer, or what the last one failed with, or Unavailable while none is registered."""
    last: DomainError = Unavailable(
        "DEPENDENCY_UNAVAILABLE", "no trainer is registered to analyse the dataset; one has to join first"
    )
    for address in await list_analyzers(store.pool, ANALYZERS_ASKED_MAX):
        try:
            return await call(peers.datasets(address))
        except (Unavailable, DeadlineExceeded, Cancelled) as error:
            log.warning("trainer did not answer", address=address, error=str(error))
            last = error
        finally:
            await peers.prune()
    raise last
