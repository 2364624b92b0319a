"""A job over two nodes on the real mesh: two agents, a device each, whose processes meet and train what one trains.

Earns its minute: this is where leases, placement, rendezvous and the engine's processes come together.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.harness.mesh import Mesh, running_mesh

SAME = 1e-4


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    async with running_mesh(folder, nodes=2, FINEMESH_TRAINER_THREADS_PER_CHILD="1") as running:
        yield running


async def test_two_nodes_train_what_one_trains_for_the_same_price(mesh: Mesh) -> None:
    spec = mesh.spec("by-two-nodes", epochs=2)
    spec.gpu_count = 2
    two = await mesh.ended((await mesh.client.jobs.create(spec)).name)
    one = await mesh.run_job("by-one-node", epochs=2)
    assert (two.state, one.state) == (pb.TUNING_JOB_STATE_SUCCEEDED,) * 2, two.error.message
    assert (two.attempt_count, one.attempt_count) == (1, 1)
    assert two.progress.training_loss == pytest.approx(one.progress.training_loss, abs=SAME)
    assert two.progress.validation_loss == pytest.approx(one.progress.validation_loss, abs=SAME)
    assert two.progress.trained_tokens == one.progress.trained_tokens
    charges = [await mesh.settled(job.name) for job in (two, one)]
    assert charges[0].charged_nanos_usd == charges[1].charged_nanos_usd == two.quoted_nanos_usd  # type: ignore[attr-defined]
    nodes = await mesh.rows("scheduler", "SELECT node FROM allocations WHERE owner = $1 ORDER BY lease_token", two.name)
    assert len({row["node"] for row in nodes}) == 2
    await mesh.until_nobody_trains()


@pytest.mark.parametrize("leads", [True, False])
async def test_a_process_killed_on_either_node_sets_both_back_to_the_last_checkpoint(mesh: Mesh, leads: bool) -> None:
    spec = mesh.spec(f"killed-{leads}".lower())
    spec.gpu_count = 2
    name = (await mesh.client.jobs.create(spec)).name
    await mesh.until_checkpoint(name)
    (row,) = await mesh.rows(
        "scheduler",
        "SELECT node FROM allocations WHERE owner = $1 AND released_at IS NULL AND (leader_token IS NULL) = $2",
        name,
        leads,
    )
    children = {agent: child for agent, child in mesh.training_children().items() if agent.endswith(row["node"][-1])}
    (child,) = children.values()
    child.kill()
    job = await mesh.ended(name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert job.attempt_count == 2
    charge = await mesh.settled(name)
    assert charge.charged_nanos_usd == job.quoted_nanos_usd  # type: ignore[attr-defined]
    await mesh.until_nobody_trains()
