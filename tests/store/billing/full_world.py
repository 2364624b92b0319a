"""A world with everything in it that billing books: jobs of every fate, served usage, a closed invoice, what came after
it, credit notes. Verification must find nothing in it.
"""

from datetime import UTC, datetime, timedelta

from chassis.db.pool import transaction
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.holds.expiry import Word
from services.billing.holds.store import HoldStore
from services.billing.invoices import crediting, invoicing
from services.billing.invoices.crediting import Correction
from services.billing.limits import Limits
from tests.store.billing.world import (
    LARGE,
    USD,
    World,
    ended,
    evaluate,
    minute,
    resource,
    served,
    train,
    whole_run,
)

DONE, OPEN, STOPPED, FREED, FAILED, LATE, FORGOTTEN = (f"ft-{number}" for number in range(1, 8))
NOVEMBER = Month(year=2026, month=11)
SETTINGS = BillingSettings(issuer_legal_name="Mesh Ltd", issuer_address_lines=("1 Road",))


async def fill(world: World) -> None:
    """Two organizations with a job of every fate, served tokens and minutes, and calls that are worth nothing."""
    for organization in ("a", "b"):
        await world.top_up(organization, 100 * USD)
        await world.hold(organization, DONE, LARGE)
        run = [train(organization, step, step + 20, tokens_per_step=10_000) for step in range(0, 200, 20)]
        run += [evaluate(organization, number, tokens=50_000) for number in range(1, 7)]
        await world.deliver(*run, ended(organization, "COMPLETED", len(run)))
        await world.hold(organization, OPEN)
        await world.deliver(train(organization, 0, 20, OPEN))
        await world.hold(organization, STOPPED)
        await world.deliver(*whole_run(organization, STOPPED)[:5], ended(organization, "STOPPED_EARLY", 5, STOPPED))
        await world.hold(organization, FREED)
        await world.release(organization, FREED)
        await world.hold(organization, FAILED)
        # The record comes after the ending, which owes nothing and waits for nobody.
        await world.deliver(ended(organization, "PLATFORM_FAILURE", 1, FAILED), train(organization, 0, 40, FAILED))
        await world.deliver(
            served(organization, ("gen-1", 1000, 20), ("gen-2", 0, 7), ("gen-0", 0, 0)),
            served(organization, ("gen-3", 5, 0), ("gen-4", 5, 0), model="acme/other"),
            served(organization, ("gen-5", 1, 0)),
            minute(organization, 0, hardware="nvidia-h100-80gb", devices=8),
            minute(organization, 1),
        )
    await expire(world)
    await close_and_correct(world)


async def expire(world: World) -> None:
    """One job whose ending is known and whose usage is not, one of which nothing more was heard."""
    await world.hold("a", LATE)
    await world.deliver(*whole_run("a", LATE)[:5], ended("a", "CANCELLED_RUNNING", 16, LATE))
    await world.hold("a", FORGOTTEN)
    await world.deliver(train("a", 0, 20, FORGOTTEN))
    async with transaction(world.pool) as connection:
        open_jobs = [resource(organization, OPEN) for organization in ("a", "b")]
        assert not await HoldStore(connection).renew(open_jobs, timedelta(days=60))
    await world.pass_time(timedelta(days=1))
    words = {resource("a", LATE): Word.ENDED, resource("a", FORGOTTEN): Word.UNKNOWN}
    assert await world.expiry().end(words) == []
    assert (await world.hold_row("a", FORGOTTEN))["state"] == "expired"


async def close_and_correct(world: World) -> None:
    """The invoice of one organization is closed; then November's usage still comes, and money is given back."""
    world.clock.jump((datetime(2026, 12, 5, tzinfo=UTC) - world.clock.now()).total_seconds())
    async with transaction(world.pool) as connection:
        await invoicing.close(
            connection,
            world.outbox,
            SETTINGS.invoice_terms,
            organization_id="a",
            month=NOVEMBER,
            now=world.clock.now(),
        )
    await world.deliver(served("a", ("gen-late", 1000, 1000)))
    for organization, invoice in (("a", "organizations/a/invoices/2026-11"), ("b", "")):
        correction = Correction(
            organization_id=organization,
            request_id="sorry",
            amount_nanos_usd=USD,
            reason="we were slow",
            resource="",
            invoice=invoice,
            month=NOVEMBER if invoice else None,
        )
        async with transaction(world.pool) as connection:
            await crediting.give_back(connection, world.outbox, correction, now=world.clock.now(), limits=Limits())
