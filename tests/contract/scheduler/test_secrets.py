"""Secrets of a job: told to the holder of its lease, to nobody else, nowhere readable, and gone when the job ends."""

import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from chassis.errors import Aborted, FailedPrecondition, InvalidArgument
from chassis.identity import acting_as
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2, tuning_secrets_pb2, tuning_service_pb2
from tests.contract.scheduler.agent import Agent
from tests.contract.scheduler.world import OWNER, World, running_world
from tests.harness.fixtures import SettingsFactory

_pb = tuning_service_pb2
WANDB_KEY, HUB_TOKEN = "wandb-key-2f9c81d0", "hf_token-77ab03e5"
SECRETS = tuning_secrets_pb2.TuningSecrets(wandb_api_key=WANDB_KEY, hub_token=HUB_TOKEN)
NOTHING = tuning_secrets_pb2.TuningSecrets()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keeping(make_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A scheduler that may keep secrets."""
    port_file: Path = tmp_path_factory.mktemp("keeping") / "port"
    async with running_world(make_settings, port_file, secrets_key="0123456789abcdef" * 3) as world:
        yield world


def wanting(world: World) -> tuning_job_pb2.TuningSpec:
    spec = world.spec()
    spec.integrations.wandb.project = "curves"
    spec.integrations.hub_push.repository = "acme/tuned"
    return spec


async def create(
    world: World,
    secrets: tuning_secrets_pb2.TuningSecrets,
    spec: tuning_job_pb2.TuningSpec | None = None,
    key: str = "",
) -> tuning_job_pb2.TuningJob:
    request = _pb.CreateTuningJobRequest(spec=spec or wanting(world), secrets=secrets, request_id=key)
    with acting_as(OWNER):
        job: tuning_job_pb2.TuningJob = (await world.tuning.CreateTuningJob(request)).tuning_job
    return job


async def fetched(
    agent: Agent, assignment: node_pb2.Assignment, token: int | None = None
) -> tuning_secrets_pb2.TuningSecrets:
    request = node_service_pb2.FetchJobSecretsRequest(
        lease_token=assignment.lease.token if token is None else token, tuning_job=assignment.lease.tuning_job
    )
    found: tuning_secrets_pb2.TuningSecrets = (await agent.stub.FetchJobSecrets(request)).secrets
    return found


async def dump(world: World) -> str:
    """Every row of every table in every schema that the scheduler's role can read, as text."""
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        tables = await connection.fetch(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        parts = []
        for schema, table in tables:
            parts += [row[0] for row in await connection.fetch(f'SELECT t::text FROM "{schema}"."{table}" AS t')]  # noqa: S608
        return "\n".join(parts)
    finally:
        await connection.close()


def assert_hidden(text: str) -> None:
    for secret in (WANDB_KEY, HUB_TOKEN):
        plain = secret.encode()
        for form in (secret, plain.hex(), base64.b64encode(plain).decode().rstrip("=")):
            assert form not in text


async def shown(world: World, name: str) -> list[Message]:
    """Everything that a user can ask about jobs."""
    with acting_as(OWNER):
        return [
            await world.tuning.GetTuningJob(_pb.GetTuningJobRequest(name=name)),
            await world.tuning.ListTuningJobs(_pb.ListTuningJobsRequest(page_size=1000)),
            await world.tuning.ListTuningJobEvents(_pb.ListTuningJobEventsRequest(parent=name, page_size=1000)),
        ]


async def secrets_kept(world: World) -> int:
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        count: int = await connection.fetchval("SELECT count(*) FROM job_secrets")
        return count
    finally:
        await connection.close()


async def test_only_the_holder_of_the_lease_reads_them_and_they_end_with_the_job(
    keeping: World, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with keeping.agent() as agent:
        job = await create(keeping, SECRETS, key="once")
        assert job.spec.integrations.wandb.base_url == "https://api.wandb.ai"
        assert job.spec.integrations.wandb.run_name == job.name.rpartition("/")[2]
        assert await secrets_kept(keeping) == 1
        assert_hidden(await dump(keeping))
        assert HUB_TOKEN.encode().hex() in (await probe(keeping)), "the dump would show a secret that lies open"
        assignment = await agent.assignment()
        assert assignment.lease.tuning_job == job.name
        assert_hidden(str(assignment) + assignment.SerializeToString().decode("latin-1"))
        assert await fetched(agent, assignment) == SECRETS
        for stale in (assignment.lease.token - 1, assignment.lease.token + 1):
            with pytest.raises(Aborted) as refused:
                await fetched(agent, assignment, stale)
            assert refused.value.reason == "LEASE_STALE"
        await agent.start(assignment)
        await agent.progress(assignment, 0, 20)
        await agent.succeed(assignment)
        with pytest.raises(Aborted):
            await fetched(agent, assignment)
        assert await secrets_kept(keeping) == 0
        for message in await shown(keeping, job.name):
            assert_hidden(str(message) + message.SerializeToString().decode("latin-1"))
        await agent.idle()
        await create(keeping, NOTHING, keeping.spec())
        other = await agent.assignment()
        assert await fetched(agent, other) == NOTHING
        await keeping.cancel(other.lease.tuning_job)
        await agent.stop(await agent.assignment(cancelled=True), 0)
    assert_hidden(await dump(keeping))
    output = capfd.readouterr()
    assert_hidden(output.out + output.err + caplog.text)


async def probe(world: World) -> str:
    """The dump with a secret lying open in it, to show that it would be seen."""
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        await connection.execute("CREATE TABLE open_secrets (value bytea)")
        await connection.execute("INSERT INTO open_secrets VALUES ($1)", SECRETS.SerializeToString())
        return await dump(world)
    finally:
        await connection.execute("DROP TABLE open_secrets")
        await connection.close()


async def test_a_job_that_ends_before_it_runs_leaves_none(keeping: World) -> None:
    job = await create(keeping, SECRETS)
    assert await secrets_kept(keeping) == 1
    await keeping.cancel(job.name)
    await keeping.until(job.name, "CANCELLED")
    assert await secrets_kept(keeping) == 0


async def test_a_job_that_is_refused_leaves_none(keeping: World) -> None:
    keeping.script.analysis_error = InvalidArgument("DATASET_INVALID", "no")
    try:
        async with keeping.agent():
            job = await create(keeping, SECRETS)
            await keeping.until(job.name, "FAILED")
            assert await secrets_kept(keeping) == 0
    finally:
        keeping.script.analysis_error = None


async def test_refusals_name_the_field_and_never_the_secret(keeping: World) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await create(keeping, tuning_secrets_pb2.TuningSecrets(wandb_api_key=f"{WANDB_KEY} x"))
    fields = {violation.field for violation in refused.value.violations}
    assert fields == {"secrets.wandb_api_key", "secrets.hub_token"}
    assert_hidden(f"{refused.value} {refused.value.violations} {refused.value.metadata}")
    assert await secrets_kept(keeping) == 0


async def test_without_a_key_a_job_with_secrets_is_refused(world: World) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        await create(world, SECRETS)
    assert refused.value.reason == "NOT_OFFERED"
    assert "FINEMESH_SCHEDULER_SECRETS_KEY" in str(refused.value)


async def test_a_start_from_the_hub_stays_at_the_commit_that_the_first_attempt_found(keeping: World) -> None:
    """And its token is told to the node, and kept in the clear nowhere."""
    spec = keeping.spec(from_hub={"repository": "acme/start", "revision": "main"})
    async with keeping.agent() as agent:
        job = await create(keeping, tuning_secrets_pb2.TuningSecrets(hub_token=HUB_TOKEN), spec)
        assert_hidden(await dump(keeping))
        assignment = await agent.assignment()
        assert (assignment.start_from.hub.repository, assignment.start_from.hub.revision) == ("acme/start", "main")
        assert (await fetched(agent, assignment)).hub_token == HUB_TOKEN
        with pytest.raises(InvalidArgument):
            await agent.start(assignment, hub_commit="main")
        await agent.start(assignment, hub_commit="c" * 40)
        error = tuning_job_pb2.JobError(reason="TRAINING_FAILED", message="a process died", platform_fault=True)
        await agent.fail(assignment, error, retryable=True)
        await keeping.when(job.name, lambda job: job.attempt_count == 2)
        again = await agent.assignment(after=assignment)
        assert again.lease.token != assignment.lease.token
        assert again.start_from.hub.revision == "c" * 40
        shown_job = await keeping.get(job.name)
        assert shown_job.spec.from_hub.revision == "main"
        await agent.start(again, hub_commit="c" * 40)
        await agent.succeed(again)
        await keeping.until(job.name, "SUCCEEDED")


async def test_the_nodes_of_a_gang_all_read_them(keeping: World) -> None:
    async with keeping.agent(node="n1") as one, keeping.agent(node="n2") as other:
        job = await create(keeping, SECRETS, keeping.spec(gpu_count=2, integrations=wanting(keeping).integrations))
        parts = [(agent, await agent.assignment()) for agent in (one, other)]
        for agent, part in parts:
            assert await fetched(agent, part) == SECRETS
        leader, leading = next(pair for pair in parts if pair[1].gang.leads)
        await leader.start(leading)
        await leader.succeed(leading)
        await keeping.until(job.name, "SUCCEEDED")
        for agent, part in parts:
            with pytest.raises(Aborted):
                await fetched(agent, part)
