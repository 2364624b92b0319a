"""What tokens cost at most, as billing says. Not pure: gRPC.

A call is reserved at this price. A token is rounded up to whole nano-dollars, so that however billing cuts and rounds
what was used, it books at most this.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass

import grpc

from chassis.clock import Clock
from chassis.errors import DomainError, is_away
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from services.inference.spending.refusals import billing_away

TOKENS_PER_RATE = 10**6


@dataclass(frozen=True, kw_only=True)
class TokenPrice:
    """Nano-dollars for each token."""

    input_nanos_usd: int
    output_nanos_usd: int

    @classmethod
    def of_million(cls, input_nanos_usd: int, output_nanos_usd: int) -> TokenPrice:
        """From the prices of a million tokens."""
        return cls(
            input_nanos_usd=-(-input_nanos_usd // TOKENS_PER_RATE),
            output_nanos_usd=-(-output_nanos_usd // TOKENS_PER_RATE),
        )

    @property
    def is_free(self) -> bool:
        """Whether nothing need be reserved."""
        return not self.input_nanos_usd and not self.output_nanos_usd

    def of(self, input_tokens: int, output_tokens: int) -> int:
        """What these tokens cost at most."""
        return input_tokens * self.input_nanos_usd + output_tokens * self.output_nanos_usd


class TokenPrices:
    """Prices by base model. They are asked for once and again in time, so that no later call waits for them."""

    def __init__(self, billing: grpc.aio.Channel, *, deadline_s: float, clock: Clock) -> None:
        self._billing = credit_lease_service_pb2_grpc.CreditLeaseServiceStub(billing)
        self._deadline_s = deadline_s
        self._clock = clock
        # With the moments from which on a price is asked for again, and from which on it may not be used any more.
        self._known: dict[str, tuple[TokenPrice, float, float]] = {}
        self._asking: dict[str, asyncio.Task[TokenPrice]] = {}

    async def of(self, base_model: str) -> TokenPrice:
        """The price of a model; a typed error when it has none, or billing cannot be asked."""
        known, now = self._known.get(base_model), self._clock.monotonic()
        if known is not None and now < known[1]:
            return known[0]
        asking = self._asking.get(base_model)
        if asking is None:
            # For every call that waits, so without the deadline and the caller of the first one.
            asking = asyncio.create_task(self._ask(base_model), context=contextvars.Context())
            self._asking[base_model] = asking
            asking.add_done_callback(lambda done: self._asked(base_model, done))
        if known is not None and now < known[2]:
            return known[0]
        return await asyncio.shield(asking)

    async def _ask(self, base_model: str) -> TokenPrice:
        asked_at, request = self._clock.monotonic(), pb.GetTokenPriceRequest(base_model=base_model)
        try:
            answer = await self._billing.GetTokenPrice(request, timeout=self._deadline_s)
        except DomainError as error:
            if not is_away(error):
                raise
            raise billing_away(error.message) from error
        price = TokenPrice.of_million(answer.input_nanos_usd_per_million, answer.output_nanos_usd_per_million)
        valid_s = answer.valid_duration.ToTimedelta().total_seconds()
        self._known[base_model] = (price, asked_at + valid_s / 2, asked_at + valid_s)
        return price

    def _asked(self, base_model: str, done: asyncio.Task[TokenPrice]) -> None:
        del self._asking[base_model]
        if not done.cancelled():
            # Nobody may have waited for it.
            done.exception()
