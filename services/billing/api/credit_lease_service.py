"""CreditLeaseService, for inference: what calls may cost is leased before they begin. Decided in `leasing/`."""

from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import FieldViolation, invalid, refuse_invalid
from chassis.names import is_id
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from services.billing.api.errors import typed_errors
from services.billing.budgets.cap_refusals import CapRefusals
from services.billing.budgets.caps import Spender
from services.billing.config import BillingSettings
from services.billing.leasing.credit_lease import CreditLease, Wish
from services.billing.leasing.granting import GrantRequest, check_room, grant
from services.billing.leasing.recall import Recall
from services.billing.leasing.store import LeaseStore, Returned
from services.billing.prices.catalogue import Catalogue

# A day of minutes; also of devices, which is more than any endpoint has.
MINUTES_CHECKED_MAX = 1440


class CreditLeaseService(credit_lease_service_pb2_grpc.CreditLeaseServiceServicer):
    def __init__(
        self,
        pool: Pool,
        catalogue: Catalogue,
        settings: BillingSettings,
        recall: Recall,
        cap_refusals: CapRefusals,
        *,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._settings = settings
        self._recall = recall
        self._cap_refusals = cap_refusals
        self._clock = clock

    async def GetTokenPrice(self, request: pb.GetTokenPriceRequest, context: Any) -> pb.GetTokenPriceResponse:
        now = self._clock.now()
        ahead = timedelta(seconds=self._settings.credit_price_s)
        with typed_errors():
            books = [self._catalogue.at(now), *self._catalogue.within(now, now + ahead)]
            rates = [book.inference_rate(request.base_model) for book in books]
        return pb.GetTokenPriceResponse(
            input_nanos_usd_per_million=max(rate.input_nanos_usd_per_million for rate in rates),
            output_nanos_usd_per_million=max(rate.output_nanos_usd_per_million for rate in rates),
            # A call that begins at the end of it has as much time again.
            valid_duration=_duration(ahead / 2),
        )

    async def GrantCredit(self, request: pb.GrantCreditRequest, context: Any) -> pb.GrantCreditResponse:
        self._check(request)
        wanted = GrantRequest(
            holder=request.holder,
            lease_id=request.lease_id,
            organization_id=request.organization_id,
            spender=Spender(request.project_id, request.api_key_id),
            revision=request.revision,
            wish=Wish(
                required_nanos_usd=request.required_nanos_usd,
                needed_nanos_usd=request.needed_nanos_usd,
                wanted_nanos_usd=request.wanted_nanos_usd,
            ),
        )
        async with self._cap_refusals.telling(wanted.organization_id, wanted.spender):
            granted = await self._recall.retrying(
                lambda: self._grant(wanted), organization_id=wanted.organization_id, asking_lease_id=wanted.lease_id
            )
        return pb.GrantCreditResponse(granted_nanos_usd=granted.granted_nanos_usd)

    async def CheckEndpointMinutes(
        self, request: pb.CheckEndpointMinutesRequest, context: Any
    ) -> pb.CheckEndpointMinutesResponse:
        for field in ("organization_id", "project_id"):
            self._check_id(field, getattr(request, field))
        refuse_invalid(
            [
                FieldViolation(field, f"must be from 1 to {MINUTES_CHECKED_MAX}")
                for field in ("device_count", "minutes")
                if not 1 <= getattr(request, field) <= MINUTES_CHECKED_MAX
            ]
        )
        book = self._catalogue.at(self._clock.now())
        with typed_errors():
            rate = book.hosting_rate(request.hardware_type) if request.hardware_type else book.cheapest_hosting_rate()
        required_nanos_usd = request.minutes * request.device_count * rate.nanos_usd_per_device_minute
        what = f"an endpoint for its first {request.minutes} minutes"
        spender = Spender(request.project_id)
        async with self._cap_refusals.telling(request.organization_id, spender):
            await self._recall.retrying(
                lambda: self._check_room(request.organization_id, spender, required_nanos_usd, what),
                organization_id=request.organization_id,
            )
        return pb.CheckEndpointMinutesResponse(required_nanos_usd=required_nanos_usd)

    async def RenewCreditLeases(
        self, request: pb.RenewCreditLeasesRequest, context: Any
    ) -> pb.RenewCreditLeasesResponse:
        self._check_id("holder", request.holder)
        returns_max = self._settings.credit_returns_max
        if len(request.returns) > returns_max:
            raise invalid("returns", f"must be at most {returns_max} (credit_returns_max)")
        returns = [
            Returned(
                lease_id=each.lease_id,
                revision=each.revision,
                granted_nanos_usd=max(0, each.granted_nanos_usd),
                closed=each.closed,
            )
            for each in request.returns
        ]
        lifetime = timedelta(seconds=self._settings.credit_lease_s)
        async with transaction(self._pool) as connection:
            leases = LeaseStore(connection)
            known = await leases.renew_holder(request.holder, lifetime)
            await leases.give_back(request.holder, returns)
            recalled = await leases.list_recalled(request.holder, returns_max)
            if request.leaving:
                await leases.delete_holder(request.holder)
        return pb.RenewCreditLeasesResponse(
            known=known, lease_duration=_duration(lifetime), recalled_lease_ids=recalled
        )

    async def _grant(self, request: GrantRequest) -> CreditLease:
        async with transaction(self._pool) as connection:
            return await grant(
                connection,
                request,
                share=self._settings.credit_lease_share,
                late_usage=self._settings.credit_late_usage,
                now=self._clock.now(),
            )

    async def _check_room(self, organization_id: str, spender: Spender, required_nanos_usd: int, what: str) -> None:
        async with transaction(self._pool) as connection:
            await check_room(
                connection,
                organization_id=organization_id,
                spender=spender,
                required_nanos_usd=required_nanos_usd,
                late_usage=self._settings.credit_late_usage,
                now=self._clock.now(),
                what=what,
            )

    def _check(self, request: pb.GrantCreditRequest) -> None:
        for field in ("holder", "lease_id", "organization_id", "project_id"):
            self._check_id(field, getattr(request, field))
        if request.api_key_id:
            self._check_id("api_key_id", request.api_key_id)
        amount_max = self._settings.amount_nanos_usd_max
        refuse_invalid(
            [
                FieldViolation(field, f"must be from 0 to {amount_max}")
                for field in ("required_nanos_usd", "needed_nanos_usd", "wanted_nanos_usd")
                if not 0 <= getattr(request, field) <= amount_max
            ]
        )

    @staticmethod
    def _check_id(field: str, value: str) -> None:
        if not is_id(value):
            raise invalid(field, "is no id")


def _duration(value: timedelta) -> Duration:
    made = Duration()
    made.FromTimedelta(value)
    return made
