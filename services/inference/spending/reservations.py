"""What calls reserve before they begin and while they go on. Not pure: it waits for grants.

A call reserves the price of its prompt and of its longest answer, so that it never costs more than is there. A long
answer that is streamed reserves a part at a time, ahead of what the engine says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.inference.spending.credit_keeper import CreditKeeper
from services.inference.spending.lease_account import LeaseAccount, Spender
from services.inference.spending.token_price import TokenPrice, TokenPrices


class Reservation:
    """Of one call. Nothing is reserved before `begin`."""

    def __init__(self, keeper: CreditKeeper, account: LeaseAccount, price: TokenPrice, *, part_tokens: int) -> None:
        self._keeper = keeper
        self._account = account
        self._price = price
        self._part_tokens = part_tokens
        # Nearly always one piece; another one when billing ended the lease meanwhile.
        self._pieces: list[tuple[LeaseAccount, int]] = []
        self._input_tokens = self._output_tokens = 0
        self._said_something = False
        self._covered_tokens = self._output_tokens_max = 0

    @property
    def lease_id(self) -> str:
        """The lease that booked usage lowers."""
        return self._account.lease_id

    async def begin(self, input_tokens: int, output_tokens_max: int, *, whole: bool) -> None:
        """Reserves for the prompt and the longest answer, that of all choices together, or its first part.

        A typed error when that cannot be paid.

        An answer that its caller only gets when it is `whole` is reserved as a whole: cut, it would be paid and lost.
        """
        self._input_tokens, self._output_tokens_max = input_tokens, output_tokens_max
        first = output_tokens_max if whole else min(output_tokens_max, self._part_tokens)
        what = f"the call, with {input_tokens} tokens of prompt and up to {first} of answer,"
        await self._add(self._price.of(input_tokens, first), what)
        self._covered_tokens = first

    async def cover(self, output_tokens: int) -> None:
        """Comes before the answer is as long as this; a typed error when what comes next cannot be paid.

        Asks ahead, when half of a part is left, and waits only when nothing is left.
        """
        while self._covered_tokens < self._output_tokens_max and (
            output_tokens > self._covered_tokens - self._part_tokens // 2
        ):
            more = min(self._part_tokens, self._output_tokens_max - self._covered_tokens)
            amount = self._price.of(0, more)
            if output_tokens <= self._covered_tokens:
                if not self._keeper.reserve_now(self._account, amount):
                    self._keeper.refill(self._account)
                    break
                self._pieces.append((self._account, amount))
            else:
                await self._add(amount, f"the answer, which has {self._covered_tokens} tokens, with {more} more")
            self._covered_tokens += more
        self._output_tokens, self._said_something = output_tokens, True

    def settle(self) -> None:
        """What was not used is free for other calls."""
        # A call that is left before the engine said anything costs nothing.
        left = self._price.of(self._input_tokens, self._output_tokens) if self._said_something else 0
        for account, amount in self._pieces:
            used = min(amount, left)
            account.settle(amount, used)
            left -= used
        assert not left, "what was covered was reserved"
        self._pieces.clear()

    async def _add(self, amount: int, what: str) -> None:
        self._account = await self._keeper.reserve(self._account, amount, what=what)
        self._pieces.append((self._account, amount))


class Reservations:
    """Begins reservations for calls."""

    def __init__(self, keeper: CreditKeeper, prices: TokenPrices, *, part_tokens: int) -> None:
        self._keeper = keeper
        self._prices = prices
        self._part_tokens = part_tokens

    @asynccontextmanager
    async def reserve(self, spender: Spender, base_model: str) -> AsyncIterator[Reservation | None]:
        """A reservation for the length of the block; None where tokens cost nothing.

        A typed error for a spender who can pay nothing, before anything is done for the call.
        """
        price = await self._prices.of(base_model)
        if price.is_free:
            yield None
            return
        account = await self._keeper.require(self._keeper.account(spender), what="the call")
        account.calls += 1
        reservation = Reservation(self._keeper, account, price, part_tokens=self._part_tokens)
        try:
            yield reservation
        finally:
            reservation.settle()
            account.calls -= 1
