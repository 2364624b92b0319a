"""From billing's events to what is known of credit and caps, and from leases to what billing is asked."""

from __future__ import annotations

from collections.abc import Iterable

from chassis.bus.envelope import claimed_time
from finemesh.credit.v1 import credit_lease_service_pb2
from finemesh.events.v1 import billing_events_pb2
from services.inference.spending.lease_account import LeaseAccount
from services.inference.spending.lease_book import Returned
from services.inference.spending.states import CapState, CreditState


def credit_state_from_proto(event: billing_events_pb2.CreditStateChanged) -> CreditState:
    """What billing says of an organization's credit."""
    return CreditState(organization_id=event.organization_id, state=event.to_state, revision=event.revision)


def cap_state_from_proto(event: billing_events_pb2.SpendCapStateChanged) -> CapState:
    """What billing says of a cap."""
    return CapState(
        project_id=event.project_id,
        api_key_id=event.api_key_id,
        capped=event.capped,
        until_time=claimed_time("until_time", event.until_time),
        cap_nanos_usd=event.cap_nanos_usd,
        revision=event.revision,
    )


def grant_to_proto(
    holder: str, account: LeaseAccount, *, revision: int, required: int, needed: int, wanted: int
) -> credit_lease_service_pb2.GrantCreditRequest:
    """What a lease should come to."""
    return credit_lease_service_pb2.GrantCreditRequest(
        holder=holder,
        lease_id=account.lease_id,
        organization_id=account.spender.organization_id,
        project_id=account.spender.project_id,
        api_key_id=account.spender.api_key_id,
        revision=revision,
        required_nanos_usd=required,
        needed_nanos_usd=needed,
        wanted_nanos_usd=wanted,
    )


def renewal_to_proto(
    holder: str, returns: Iterable[Returned], *, leaving: bool
) -> credit_lease_service_pb2.RenewCreditLeasesRequest:
    """A sign of life, with what comes to less than before."""
    return credit_lease_service_pb2.RenewCreditLeasesRequest(
        holder=holder,
        returns=[
            credit_lease_service_pb2.ReturnedCredit(
                lease_id=each.lease_id, revision=each.revision, granted_nanos_usd=each.granted, closed=each.closed
            )
            for each in returns
        ],
        leaving=leaving,
    )
