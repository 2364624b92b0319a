"""One storm, and what its checker says of lies: a check that finds nothing in a lie would find nothing in a defect.

Earns its half minute: two of each service, three nodes and their databases meet kills, freezes, cuts and set clocks.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import pytest_asyncio

from tests.storm.deeds import Deeds
from tests.storm.plan import Trouble
from tests.storm.seed_run import Outcome, plan_of, run_seed, truths_of
from tests.storm.storm_mesh import StormMesh, storm_mesh

# It has a fault of each kind, and users who do everything.
SEED = 1


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StormMesh]:
    async with storm_mesh(tmp_path_factory.mktemp("storm")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def outcome(mesh: StormMesh) -> Outcome:
    return await run_seed(mesh, SEED)


def test_the_same_seed_is_the_same_plan() -> None:
    assert plan_of(SEED) == plan_of(SEED) != plan_of(SEED + 1)
    assert {fault.trouble for seed in range(10) for fault in plan_of(seed).faults} == set(Trouble)


async def test_nothing_is_lost_and_nothing_is_left(outcome: Outcome) -> None:
    assert outcome.findings == [], "\n".join(outcome.plan.lines())


def _file(deeds: Deeds) -> str:
    name = next(iter(deeds.files))
    deeds.files[name] = "0" * 64
    return f"{name} has other bytes"


def _lost_file(deeds: Deeds) -> str:
    name = f"{next(iter(deeds.files))}0"
    deeds.files[name] = "0" * 64
    return f"{name} was acknowledged and does not exist"


def _step(deeds: Deeds) -> str:
    name = next(name for name in deeds.jobs if name not in deeds.cancelled)
    deeds.jobs[name] += 1
    return f"{name} succeeded with {deeds.jobs[name]} steps"


def _job(deeds: Deeds) -> str:
    name = next(iter(deeds.jobs))
    del deeds.jobs[name]
    return f"{name} was billed and never acknowledged"


def _token(deeds: Deeds) -> str:
    call = next(call for call in deeds.calls if call.whole and not call.dedicated)
    object.__setattr__(call, "output_tokens", call.output_tokens + 1)
    return f"{call.generation_id} said"


def _minute(deeds: Deeds) -> str:
    name = next(iter(deeds.endpoints))
    deeds.endpoints[name] = -10.0
    return f"{name} lived -10.0 s"


def _top_up(deeds: Deeds) -> str:
    deeds.topped_up.append(1)
    return "acknowledged were top-ups"


@pytest.mark.parametrize("lie", [_file, _lost_file, _step, _job, _token, _minute, _top_up])
async def test_a_lie_is_found(mesh: StormMesh, outcome: Outcome, lie: Callable[[Deeds], str]) -> None:
    deeds = copy.deepcopy(outcome.storm.deeds)
    expected = lie(deeds)
    found = await truths_of(mesh, replace(outcome.storm, deeds=deeds))
    assert any(line.startswith(expected) for line in found), found
