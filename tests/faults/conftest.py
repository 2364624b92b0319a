"""One mesh and one undisturbed job for all fault tests: what a disturbed job must equal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.harness.mesh import Mesh, running_mesh


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("faults")) as running:
        yield running


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a job of the same spec gives when nobody disturbs it."""

    adapter_sha256: str
    charged_nanos_usd: int
    usage_keys: frozenset[str]


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def undisturbed(mesh: Mesh) -> Undisturbed:
    job = await mesh.run_job("undisturbed")
    assert job.state == 6, job.error.message  # TUNING_JOB_STATE_SUCCEEDED
    charge = await mesh.settled(job.name)
    usage = [record async for record in mesh.client.billing.usage(job.name)]
    return Undisturbed(
        adapter_sha256=await mesh.adapter_sha256(job.output_model),
        charged_nanos_usd=charge.charged_nanos_usd,  # type: ignore[attr-defined]
        usage_keys=frozenset(record.work_key.partition(":")[2] for record in usage),
    )
