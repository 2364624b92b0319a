"""Gets leases of credit from billing, keeps them alive and gives back what is not needed. Not pure: gRPC, tasks.

A call that fits into its lease asks nobody. One that does not waits for a grant, together with the others of its
spender; a lease that runs low is enlarged before a call has to wait. All leases are renewed by one small call.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from dataclasses import dataclass

import grpc
import structlog

from chassis.clock import Clock
from chassis.errors import Aborted, DomainError, FailedPrecondition, Internal, is_away
from chassis.ids import Ids
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from services.inference.config import InferenceSettings
from services.inference.spending import convert
from services.inference.spending.lease_account import LeaseAccount, Spender
from services.inference.spending.lease_book import LeaseBook
from services.inference.spending.refusals import Refusal, billing_away, refusal_of, refused

RETURNS_MAX = 1000
log = structlog.get_logger()


@dataclass
class _Asking:
    """A spender whose lease is being enlarged, and what its waiting calls need."""

    waiting: int = 0
    task: asyncio.Task[Refusal | None] | None = None
    # What billing said last, and until when it is not asked again for the same.
    refusal: Refusal | None = None
    refused_until: float = 0.0
    refill_after: float = 0.0


class CreditKeeper:
    """Leases for reservations; `reserve` is the hot path."""

    def __init__(self, billing: grpc.aio.Channel, *, settings: InferenceSettings, clock: Clock, ids: Ids) -> None:
        self._billing = credit_lease_service_pb2_grpc.CreditLeaseServiceStub(billing)
        self._settings = settings
        self._clock = clock
        self._book = LeaseBook(ids)
        self._asking: dict[Spender, _Asking] = {}
        # By the monotonic clock, counted from before billing was asked: what it gave to others since is not used.
        self._alive_until = 0.0
        self._renewing = asyncio.Lock()
        self._grants: set[asyncio.Task[Refusal | None]] = set()

    def account(self, spender: Spender) -> LeaseAccount:
        """The lease of a spender, which may have nothing yet."""
        return self._book.account(spender, self._clock.monotonic())

    def reserve_now(self, account: LeaseAccount, amount: int) -> bool:
        """Reserves without asking anybody; False when the lease has less, or was not renewed in time."""
        reserved = self._clock.monotonic() < self._alive_until and account.reserve(amount)
        if reserved and account.runs_low:
            self.refill(account)
        return reserved

    def refill(self, account: LeaseAccount) -> None:
        """Asks for more in the background, which no call waits for."""
        asking = self._asking.setdefault(account.spender, _Asking())
        if asking.task is None and self._clock.monotonic() >= asking.refill_after:
            asking.task = self._spawn(account, 0, asking)

    async def reserve(self, account: LeaseAccount, amount: int, *, what: str) -> LeaseAccount:
        """Reserves, and waits for a grant if the lease has less. Returns the lease that it came from.

        It is another one where billing has ended the given one. A typed error says why `what` cannot be paid.
        """
        wait_s_max = self._settings.credit_wait_s_max
        try:
            async with asyncio.timeout(wait_s_max):
                while not self.reserve_now(account, amount):
                    if account.over:
                        account = self.account(account.spender)
                    else:
                        await self._lack(account, amount, what)
        except TimeoutError:
            raise billing_away(f"it did not answer within {wait_s_max:g} s (credit_wait_s_max)") from None
        return account

    async def require(self, account: LeaseAccount, *, what: str) -> LeaseAccount:
        """Returns once the lease has anything at all, so that nothing is begun for a spender who can pay nothing."""
        if self._clock.monotonic() < self._alive_until and account.free > 0:
            return account
        account = await self.reserve(account, 1, what=what)
        account.settle(1, 0)
        return account

    async def run(self) -> None:
        """Renews until cancelled."""
        failing = False
        while True:
            more = False
            try:
                more = await self.renew()
            except DomainError as error:
                # Once for each time that billing is away.
                if not failing:
                    log.warning("credit_renewal_fails", error=repr(error))
                failing = True
            else:
                if failing:
                    log.info("credit_renewed")
                failing = False
            if not more:
                await self._clock.sleep(self._settings.credit_renewal_s)

    async def renew(self) -> bool:
        """Keeps the leases alive, gives back what is idle or recalled. True when there is more to give back."""
        async with self._renewing:
            self._book.give_up_idle(
                self._clock.monotonic(),
                idle_s=self._settings.credit_idle_s,
                age_s_max=self._settings.credit_lease_age_s_max,
            )
            recalled = await self._tell(leaving=False)
            self._forget_spenders()
            returned = self._book.give_back(recalled)
            return returned or len(self._book.returns(RETURNS_MAX)) == RETURNS_MAX

    async def close(self) -> None:
        """Gives everything back; what calls used waits at billing for their usage."""
        for grant in list(self._grants):
            grant.cancel()
        async with self._renewing:
            self._book.give_up_all()
            with contextlib.suppress(DomainError):
                while len(self._book.returns(RETURNS_MAX)) == RETURNS_MAX:
                    await self._tell(leaving=False)
                await self._tell(leaving=True)
            self._alive_until = 0.0

    async def _tell(self, *, leaving: bool) -> list[str]:
        """Renews and returns; the leases that billing calls back."""
        asked_at, returns, holder = self._clock.monotonic(), self._book.returns(RETURNS_MAX), self._book.holder
        known_before = self._alive_until > 0
        answer = await self._billing.RenewCreditLeases(
            convert.renewal_to_proto(holder, returns, leaving=leaving), timeout=self._settings.credit_wait_s_max
        )
        if holder != self._book.holder:
            return []
        if known_before and not answer.known:
            # Others may have what our leases held.
            log.warning("credit_leases_lost", holder=holder)
            self._lose_all()
            return []
        self._book.told(returns)
        self._alive_until = asked_at + answer.lease_duration.ToTimedelta().total_seconds()
        return list(answer.recalled_lease_ids)

    async def _lack(self, account: LeaseAccount, amount: int, what: str) -> None:
        """Waits for one grant; raises when billing has said that there is no more."""
        asking = self._asking.setdefault(account.spender, _Asking())
        if asking.refusal is None or self._clock.monotonic() >= asking.refused_until:
            asking.waiting += amount
            try:
                if asking.task is None:
                    asking.task = self._spawn(account, amount, asking)
                asking.refusal = await asyncio.shield(asking.task)
            finally:
                asking.waiting -= amount
        if asking.refusal is not None and not account.over:
            free = account.free
            if free + asking.refusal.available < amount:
                raise refused(asking.refusal, what=what, required=amount, free=free)
            # Others needed more than there was; this call may fit.
            asking.refused_until = 0.0

    def _spawn(self, account: LeaseAccount, amount: int, asking: _Asking) -> asyncio.Task[Refusal | None]:
        """For every call that waits, so without the deadline and the caller of the first one."""
        account.growing = True
        task = asyncio.create_task(self._grant(account, amount, asking), context=contextvars.Context())
        self._grants.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Refusal | None]) -> None:
        self._grants.discard(task)
        if not task.cancelled():
            # Nobody may have waited for it.
            task.exception()

    async def _grant(self, account: LeaseAccount, amount: int, asking: _Asking) -> Refusal | None:
        """Asks billing to enlarge a lease by this much at least; None when it did, or when to look again."""
        try:
            # Calls that came in the meantime, in the same turn of the loop, are asked for together.
            await asyncio.sleep(0)
            if self._clock.monotonic() >= self._alive_until:
                await self.renew()
            if account.over:
                return None
            needed = account.total_with(max(amount, asking.waiting))
            answer = await self._billing.GrantCredit(
                convert.grant_to_proto(
                    self._book.holder,
                    account,
                    revision=self._book.next_revision(account),
                    required=account.total_with(amount) if amount else 0,
                    needed=needed,
                    wanted=needed + self._settings.credit_chunk_nanos_usd,
                ),
                timeout=self._settings.credit_wait_s_max,
            )
            account.grow(answer.granted_nanos_usd, beyond=needed)
            if not account.chunk:
                # So little is left that only what calls need is granted.
                asking.refill_after = self._clock.monotonic() + self._settings.credit_refusal_s
        except FailedPrecondition as error:
            asking.refused_until = self._clock.monotonic() + self._settings.credit_refusal_s
            return refusal_of(error)
        except Aborted as error:
            log.warning("credit_lease_stale", lease_id=account.lease_id, error=repr(error))
            if "holder" not in error.metadata:
                self._book.give_up(account)
            elif error.metadata["holder"] == self._book.holder:
                self._lose_all()
        except DomainError as error:
            if not (is_away(error) or isinstance(error, Internal)):
                raise
            raise billing_away(error.message) from error
        finally:
            asking.task, account.growing = None, False
        return None

    def _lose_all(self) -> None:
        self._book.lose_all()
        self._alive_until = 0.0

    def _forget_spenders(self) -> None:
        """Of whom nothing is remembered but an old refusal."""
        now = self._clock.monotonic()
        for spender, asking in list(self._asking.items()):
            if asking.task is None and not asking.waiting and now >= asking.refused_until:
                del self._asking[spender]
