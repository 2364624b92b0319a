"""One seed: an organization of its own, users and faults side by side, healing, and the checker's findings."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from tests.harness.organizations import Tenant, add_organization
from tests.storm import truths
from tests.storm.deeds import Deeds
from tests.storm.disturbance import disturb, heal
from tests.storm.leftovers import leftovers
from tests.storm.plan import Plan, Trouble, make_plan
from tests.storm.storm_mesh import StormMesh, clock_names, link_names, process_names
from tests.storm.users import Users

# After the storm: how long a repeated call may still fail, and until when nothing is left.
PATIENCE_S = 15.0
SETTLED_S_MAX = 45.0
LOOK_S = 0.3
CREDIT_NANOS_USD = 10_000 * 10**9


@dataclass(frozen=True, kw_only=True)
class Storm:
    """Whose storm it was, what was acknowledged in it, and whether a process with engines was killed."""

    tenant: Tenant
    deeds: Deeds
    killed: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`findings` is empty when everything held; `took_s` is since the begin of the storm."""

    plan: Plan
    storm: Storm
    findings: list[str]
    took_s: dict[str, float]


def plan_of(seed: int) -> Plan:
    return make_plan(seed, processes=process_names(), links=link_names(), clocks=clock_names())


async def run_seed(mesh: StormMesh, seed: int) -> Outcome:
    plan, healed, took_s = plan_of(seed), asyncio.Event(), {}
    deaths = mesh.deaths()
    tenant = await add_organization(mesh.database_url("gateway"), f"storm-{seed}-{int(time.time() * 1000)}")
    async with mesh.client(tenant.api_key) as client:
        users = Users(client, tenant, mesh.folder, seed=seed, healed=healed, patience_s=PATIENCE_S)
        await users.insist("the first top-up", lambda: client.billing.top_up(CREDIT_NANOS_USD, request_id=f"{seed}"))
        users.deeds.topped_up.append(CREDIT_NANOS_USD)
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for act in plan.acts:
                group.create_task(users.work(act, began_s))
            await asyncio.gather(*(disturb(mesh, fault, began_s) for fault in plan.faults))
            took_s["storm"] = time.monotonic() - began_s
            await heal(mesh)
            healed.set()
            took_s["healed"] = time.monotonic() - began_s
    took_s["worked"] = time.monotonic() - began_s
    findings = await settled(mesh)
    took_s["settled"] = time.monotonic() - began_s
    killed = any(fault.trouble is Trouble.KILL and fault.target.startswith("inference") for fault in plan.faults)
    storm = Storm(tenant=tenant, deeds=users.deeds, killed=killed)
    findings += [
        f"{name} ended {count - deaths[name]} x by itself"
        for name, count in mesh.deaths().items()
        if count != deaths[name]
    ]
    findings += users.deeds.surprises + await truths_of(mesh, storm)
    took_s["checked"] = time.monotonic() - began_s
    return Outcome(plan=plan, storm=storm, findings=findings, took_s=took_s)


async def settled(mesh: StormMesh) -> list[str]:
    """What is left when nothing should be; asked again until nothing is, or the time is over."""
    deadline = time.monotonic() + SETTLED_S_MAX
    while (found := await leftovers(mesh)) and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_S)
    return found


async def truths_of(mesh: StormMesh, storm: Storm) -> list[str]:
    """What is wrong, by all checks."""
    tenant, deeds, found = storm.tenant, storm.deeds, []
    async with mesh.client(tenant.api_key) as client:
        for check in (
            truths.acknowledged_is_kept(client, deeds, mesh.folder),
            truths.training_is_paid_once(mesh, client, tenant, deeds),
            truths.calls_are_paid_once(mesh, tenant, deeds, killed=storm.killed),
            truths.minutes_are_served(mesh, tenant, deeds),
            truths.credit_is_whole(mesh, tenant, deeds, client),
            truths.ledger_verifies(client),
            truths.devices_had_one_owner(mesh),
        ):
            found += [line async for line in check]
    return found
