"""What must be true after a storm: everything acknowledged exists, and money agrees with what was really done.

Each check gives a line for what it finds wrong. Not pure: the public API, databases, the witness.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client
from finemesh_client.errors import NotFound
from tests.harness.fake_child import TOKENS_PER_STEP
from tests.harness.organizations import Tenant
from tests.storm import database_clock, witness
from tests.storm.deeds import Deeds
from tests.storm.storm_mesh import ENDPOINT_MINUTE_S, StormMesh

RECORDS = (
    "SELECT kind, resource, work_key, quantity, start_step, end_step FROM usage_records WHERE organization_id = $1"
)


async def acknowledged_is_kept(client: Client, deeds: Deeds, folder: Path) -> AsyncIterator[str]:
    """Files with their bytes, jobs with an end; what was deleted is gone."""
    target = folder / "read-back"
    for name, sha256 in deeds.files.items():
        try:
            await client.files.download(name, target)
        except NotFound:
            yield f"{name} was acknowledged and does not exist"
            continue
        if hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
            yield f"{name} has other bytes than were acknowledged"
    for name in deeds.deleted_files:
        try:
            await client.files.get(name)
        except NotFound:
            continue
        yield f"{name} was deleted and is there"
    for name in deeds.jobs:
        try:
            job = await client.jobs.get(name)
        except NotFound:
            yield f"{name} was acknowledged and does not exist"
            continue
        allowed = {pb.TUNING_JOB_STATE_SUCCEEDED}
        if name in deeds.cancelled:
            allowed.add(pb.TUNING_JOB_STATE_CANCELLED)
        if job.state not in allowed:
            yield f"{name} is {pb.TuningJobState.Name(job.state)}: {job.error.message}"


async def training_is_paid_once(mesh: StormMesh, client: Client, tenant: Tenant, deeds: Deeds) -> AsyncIterator[str]:
    """Each finished step of each job in one record, and none that no child did."""
    records = defaultdict(list)
    for row in await mesh.rows("billing", RECORDS, tenant.organization_id):
        if row["kind"] == "training_tokens":
            records[row["resource"]].append(row)
    done: dict[str, set[int]] = defaultdict(set)
    for line in witness.told(mesh.witness, "steps"):
        if "step" in line:
            done[line["job"]].add(line["step"])
    holds = {
        row["resource"]: row
        for row in await mesh.rows("billing", "SELECT * FROM holds WHERE organization_id = $1", tenant.organization_id)
    }
    for name in records.keys() - deeds.jobs.keys():
        yield f"{name} was billed and never acknowledged"
    for name, steps in deeds.jobs.items():
        job, job_id = await client.jobs.get(name), name.rpartition("/")[2]
        end = 0
        for row in sorted(records[name], key=lambda row: row["start_step"]):
            if row["start_step"] != end:
                yield f"{name}: {row['work_key']} is billed after step {end}"
            end = row["end_step"]
            if row["quantity"] != TOKENS_PER_STEP * (row["end_step"] - row["start_step"]):
                yield f"{name}: {row['work_key']} has {row['quantity']} tokens"
        if not set(range(1, end + 1)) <= done[job_id]:
            yield f"{name}: {end} steps were billed, done were {sorted(done[job_id])}"
        hold = holds.get(name)
        if job.state == pb.TUNING_JOB_STATE_SUCCEEDED:
            if end != steps:
                yield f"{name} succeeded with {steps} steps, and {end} were billed"
            if (
                hold is None
                or (hold["state"], hold["discrepancy"]) != ("settled", "")
                or (hold["charged_nanos_usd"] != hold["held_nanos_usd"])
            ):
                yield f"{name} succeeded and was not charged its quote: {hold and dict(hold)}"
        elif end != job.progress.step:
            yield f"{name} ended at step {job.progress.step}, and {end} were billed"


async def calls_are_paid_once(mesh: StormMesh, tenant: Tenant, deeds: Deeds, *, killed: bool) -> AsyncIterator[str]:
    """What an answer said that it used is what was billed; nothing was billed that no engine did, and all of it was,
    unless the process of the engine was `killed`."""
    billed: dict[str, Billed] = defaultdict(Billed)
    for row in await mesh.rows("billing", RECORDS, tenant.organization_id):
        if row["kind"] in ("input_tokens", "output_tokens"):
            call, part, _ = row["work_key"].split(":")
            billed[call].add(row["kind"], part, row["quantity"])
    made = {line["call"]: line for line in witness.told(mesh.witness, "tokens")}
    for call, sums in billed.items():
        if sums.overlap:
            yield f"{call} was billed twice: {sums}"
        real = made.get(call)
        if real is None:
            yield f"{call} was billed and never made: {sums}"
        elif sums.input != real["input"] or sums.output > real["output"]:
            yield f"{call} was billed {sums} and took {real['input']} and {real['output']} tokens"
    for said in deeds.calls:
        sums = billed[said.generation_id]
        if said.dedicated:
            if sums.parts:
                yield f"{said.generation_id} of an endpoint was billed by the token: {sums}"
        elif said.whole and (sums.input, sums.output) != (said.input_tokens, said.output_tokens):
            yield f"{said.generation_id} said {said.input_tokens} and {said.output_tokens}, and {sums} was billed"
        elif not killed and sums.output < said.output_tokens:
            yield f"{said.generation_id} said {said.output_tokens} tokens before it broke, and {sums} was billed"


@dataclass(kw_only=True)
class Billed:
    """Tokens of one call, part by part."""

    input: int = 0
    output: int = 0
    parts: set[int] = field(default_factory=set)
    overlap: bool = False

    def add(self, kind: str, part: str, quantity: int) -> None:
        """`part` is a range of generated tokens, `0-20`."""
        if kind == "input_tokens":
            self.input += quantity
            return
        start, _, end = part.partition("-")
        tokens = set(range(int(start), int(end)))
        self.overlap |= bool(tokens & self.parts) or len(tokens) != quantity
        self.parts |= tokens
        self.output += quantity


async def minutes_are_served(mesh: StormMesh, tenant: Tenant, deeds: Deeds) -> AsyncIterator[str]:
    """No more minutes of an endpoint than there were between the wish for it and its stop."""
    minutes: dict[str, int] = defaultdict(int)
    for row in await mesh.rows("billing", RECORDS, tenant.organization_id):
        if row["kind"] == "endpoint_minutes":
            minutes[row["resource"]] += row["quantity"]
    for name, lived_s in deeds.endpoints.items():
        # A minute is billed when it begins, so each begun one counts.
        if minutes[name] > lived_s / ENDPOINT_MINUTE_S + 1:
            yield f"{name} lived {lived_s:.1f} s and was billed {minutes[name]} minutes of {ENDPOINT_MINUTE_S} s"
    for name in minutes.keys() - deeds.endpoints.keys():
        yield f"{name} was billed and never acknowledged"


async def credit_is_whole(mesh: StormMesh, tenant: Tenant, deeds: Deeds, client: Client) -> AsyncIterator[str]:
    """Every acknowledged top-up once, and the balance is what they and all charges make of it."""
    rows = await mesh.rows(
        "billing",
        "SELECT coalesce(sum(p.amount_nanos_usd), 0) AS sum, count(*) AS count FROM transactions AS t"
        " JOIN postings AS p USING (organization_id, position)"
        " WHERE t.organization_id = $1 AND t.kind = 'top_up' AND p.account = 'prepaid'",
        tenant.organization_id,
    )
    if (rows[0]["count"], abs(rows[0]["sum"])) != (len(deeds.topped_up), sum(deeds.topped_up)):
        yield f"acknowledged were top-ups of {sorted(deeds.topped_up)}, booked {dict(rows[0])}"
    balance = await client.billing.balance()
    if balance.held_nanos_usd:
        yield f"{balance.held_nanos_usd} nano-dollars are held for nobody"


async def ledger_verifies(client: Client, organization: str = "") -> AsyncIterator[str]:
    """The caller's own ledger, or another one; `organizations/-` is all of them, which takes longer with each seed."""
    async for answer in client.ledger.verify(organization):
        if answer.done and answer.HasField("difference"):
            yield f"the ledger does not verify: {answer.difference}"


async def devices_had_one_owner(mesh: StormMesh) -> AsyncIterator[str]:
    """By the history of the allocations, and by the locks that children took."""
    owners: dict[tuple[str, int], int] = {}
    for row in await database_clock.device_history(mesh):
        device = row["node"], row["device_index"]
        if row["live"] and owners.setdefault(device, row["lease_token"]) != row["lease_token"]:
            yield f"device {device} was given to lease {row['lease_token']} while {owners[device]} had it"
        elif not row["live"] and owners.get(device) == row["lease_token"]:
            del owners[device]
    for line in witness.told(mesh.witness, "conflicts"):
        yield f"two children ran on one device: {line}"
