"""A stack that is stopped in the middle of a job: the node hands the job back, and the next start goes on with it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deploy.local.stack import Stack, StackOptions
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client, find_config
from tests.harness.mesh import NO_WARM_CHILDREN, QUICK_LEASES, Mesh, running_mesh

# No test waits that long: a job that goes on did not wait for its lease to run out.
LONG_LEASE_S = "600"
ATTEMPTS = """
SELECT attempts.outcome, attempts.message, allocations.released_at IS NOT NULL AS released
FROM attempts JOIN allocations USING (lease_token) WHERE job_id = $1 ORDER BY attempt
"""


async def test_a_stopped_stack_hands_its_job_back_and_the_next_start_goes_on_with_it(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, FINEMESH_SCHEDULER_LEASE_DURATION_S=LONG_LEASE_S) as mesh:
        job = await mesh.client.jobs.create(mesh.spec("stopped", epochs=12))
        await mesh.until_checkpoint(job.name)
    environment = {**QUICK_LEASES, **NO_WARM_CHILDREN, "FINEMESH_SCHEDULER_LEASE_DURATION_S": LONG_LEASE_S}
    options = StackOptions(data=tmp_path / "data", engine="stub", environment=environment)
    async with Stack(options) as stack, Client(find_config(data_dir=tmp_path / "data")) as client:
        again = Mesh(stack=stack, client=client, folder=tmp_path, training_file="", validation_file="")
        job_id = job.name.rpartition("/")[2]
        (first, *_) = await again.rows("scheduler", ATTEMPTS, job_id)
        assert (first["outcome"], first["released"]) == ("FAILED", True)
        assert "shut down" in first["message"] or "drain" in first["message"], first["message"]
        ended = await again.ended(job.name)
        assert (ended.state, ended.attempt_count) == (pb.TUNING_JOB_STATE_SUCCEEDED, 2), ended.error.message
        (row,) = await again.rows("scheduler", "SELECT failure_count FROM jobs WHERE job_id = $1", job_id)
        assert row["failure_count"] == 0
        await asyncio.wait_for(again.settled(job.name), 60)
