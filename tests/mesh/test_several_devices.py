"""A job over two devices of one node, on the real mesh: placed as a gang, trained by two processes, metered
and shipped as one.

Earns its half minute: this is where a device count in a request becomes processes that meet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.harness.mesh import Mesh, running_mesh


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("mesh"), FINEMESH_TRAINER_CPU_DEVICES="2", FINEMESH_TRAINER_THREADS_PER_CHILD="1"
    ) as running:
        yield running


async def test_two_devices_train_what_one_trains_for_the_same_price(mesh: Mesh) -> None:
    spec = mesh.spec("by-two", epochs=2)
    spec.gpu_count = 2
    two = await mesh.ended((await mesh.client.jobs.create(spec)).name)
    one = await mesh.run_job("by-one", epochs=2)
    assert (two.state, one.state) == (pb.TUNING_JOB_STATE_SUCCEEDED,) * 2, two.error.message
    assert two.progress.training_loss == pytest.approx(one.progress.training_loss, abs=1e-3)
    assert two.progress.validation_loss == pytest.approx(one.progress.validation_loss, abs=1e-3)
    assert two.progress.trained_tokens == one.progress.trained_tokens
    charges = [await mesh.settled(job.name) for job in (two, one)]
    assert charges[0].charged_nanos_usd == charges[1].charged_nanos_usd == two.quoted_nanos_usd  # type: ignore[attr-defined]
    await mesh.until_nobody_trains()
