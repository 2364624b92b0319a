"""The ledger for whoever wants to check it: verification by the mesh, the journal, and what could not be booked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

from finemesh.billing.v1 import ledger_service_pb2 as pb
from finemesh.billing.v1 import ledger_service_pb2_grpc
from finemesh_client.errors import Unavailable
from finemesh_client.transport import Transport


class Ledger:
    """Entries of the caller's organization; operators may name another one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = ledger_service_pb2_grpc.LedgerServiceStub(transport.channel)

    def verify(self, organization: str = "") -> AsyncIterator[pb.VerifyLedgerResponse]:
        """Progress, and in the last answer (`done`) the outcome. `organizations/-` verifies all."""
        request = pb.VerifyLedgerRequest(organization=organization)
        return self._transport.stream(self._stub.VerifyLedger, request)

    async def journal(self, organization: str = "", after_position: int = 0) -> AsyncIterator[pb.JournalEntry]:
        """Every entry in the order of the chain. Goes on after the last one when the connection breaks."""
        failures = 0
        while True:
            request = pb.ExportJournalRequest(organization=organization, after_position=after_position)
            try:
                async for answer in self._transport.stream(self._stub.ExportJournal, request):
                    for entry in answer.entries:
                        yield entry
                        after_position, failures = entry.position, 0
                return
            except Unavailable:
                failures += 1
                if failures >= self._transport.config.attempts:
                    raise

    def dead_letters(self, limit: int | None = None, *, discarded: bool = False) -> AsyncIterator[pb.DeadLetter]:
        """Events that could not be booked, or those of them that were given up, oldest first. Needs the operator
        role."""
        request = pb.ListDeadLettersRequest(discarded=discarded)
        return self._transport.pages(self._stub.ListDeadLetters, request, "dead_letters", limit)

    async def replay(self, event_id: str) -> pb.ReplayDeadLetterResponse:
        """Runs one of them again. Needs the operator role. Not repeated by itself: a second run would find nothing."""
        request = pb.ReplayDeadLetterRequest(event_id=event_id)
        answer = await self._transport.unary(self._stub.ReplayDeadLetter, request, safe=False)
        return cast(pb.ReplayDeadLetterResponse, answer)

    async def discard(self, event_id: str, reason: str) -> None:
        """Gives one of them up for good; its job's hold then ends by what is booked. Needs the operator role."""
        request = pb.DiscardDeadLetterRequest(event_id=event_id, reason=reason)
        await self._transport.unary(self._stub.DiscardDeadLetter, request, safe=False)
