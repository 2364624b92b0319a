"""The main job through docker compose: what an operator gets is built, started and used by the client, then taken down.

It earns its minutes by what no other test sees: the images, their users and files, the init script, the bus's config.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from deploy.local.table import SERVICES
from finemesh.billing.v1 import billing_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client, ClientConfig, NotFound
from finemesh_client.billing import NANOS_PER_DOLLAR
from finemesh_client.chat import sampling, user
from tests.harness.compose import Compose, running_compose
from tests.harness.mesh import BASE, make_base, make_rows, write_rows
from tests.harness.polling import eventually

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

JOB_TIMEOUT_S = 300
SETTLE_TIMEOUT_S = 60
QUESTION = "river stone number 3"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A finished job and what it was quoted before it was created."""

    job: pb.TuningJob
    quoted_nanos_usd: int


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Compose]:
    failed_before = request.session.testsfailed
    with running_compose(tmp_path_factory.mktemp("compose")) as running:
        yield running
        if request.session.testsfailed > failed_before:
            # The last moment at which they exist, and not captured: a teardown that works shows nothing.
            with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(running.logs())


@pytest.fixture(scope="module")
def api_key(compose: Compose) -> str:
    return compose.bootstrap()["api_key"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(compose: Compose, api_key: str) -> AsyncIterator[Client]:
    config = ClientConfig(address=compose.address, api_key=api_key, http_url=compose.http_url)
    async with Client(config) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tuned(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Import, credit, upload, quote, create, wait."""
    folder = tmp_path_factory.mktemp("job")
    await client.models.import_base(BASE, await asyncio.to_thread(make_base, folder))
    await client.billing.top_up(50 * NANOS_PER_DOLLAR)
    training = await client.files.upload(write_rows(folder / "train.jsonl", make_rows(120)))
    validation = await client.files.upload(write_rows(folder / "held-out.jsonl", make_rows(30, seed=1000)))
    spec = pb.TuningSpec(
        base_model=BASE,
        training_file=training.name,
        validation_file=validation.name,
        output_name="composed",
        lora=pb.LoraTraining(rank=8),
        hyperparameters=pb.Hyperparameters(epochs=4, evaluations=1, batch_size=8, learning_rate=1e-3),
    )
    quote = await client.jobs.quote(spec)
    created = await client.jobs.create(spec)
    async with asyncio.timeout(JOB_TIMEOUT_S):
        job = await client.jobs.wait(created.name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error
    return Tuned(job=job, quoted_nanos_usd=quote.total_nanos_usd)


def test_images_hold_what_they_need_and_no_more(compose: Compose) -> None:
    wanted = {
        "gateway": {"torch": False, "vllm": False, "transformers": False, "pip": False, "pytest": False},
        "trainer": {"torch": True, "transformers": True, "peft": True, "vllm": False, "pip": False},
        "inference": {"torch": True, "vllm": True, "torchvision": False, "torchaudio": False, "pip": False},
    }
    for service, modules in wanted.items():
        code = f"import importlib.util as u; print({{m: u.find_spec(m) is not None for m in {list(modules)}}})"
        assert compose.python(service, code) == str(modules), service


def test_services_have_no_rights(compose: Compose) -> None:
    """No root, no capability, a read-only root, and no key but their own."""
    for service in SERVICES:
        code = (
            "import os, pathlib; "
            "status = dict(l.split(':', 1) for l in pathlib.Path('/proc/self/status').read_text().splitlines()); "
            "print(os.getuid() != 0, int(status['CapEff'], 16) | int(status['CapBnd'], 16), "
            "status['NoNewPrivs'].strip(), "
            "os.access('/app', os.W_OK), sorted(p.name for p in pathlib.Path('/etc/finemesh/tls').glob('*.key')))"
        )
        assert compose.python(service.name, code) == f"True 0 1 False ['{service.name}.key']", service.name


def test_roles_enter_their_own_schema_only(compose: Compose) -> None:
    code = (
        "import asyncio, asyncpg, os\n"
        "async def main():\n"
        "    connection = await asyncpg.connect(os.environ['FINEMESH_BILLING_DATABASE_URL'])\n"
        "    print(await connection.fetchval('SELECT current_schema()'))\n"
        "    for statement in ('SELECT count(*) FROM gateway.api_keys', 'CREATE TABLE public.mine (id bigint)'):\n"
        "        try:\n"
        "            await connection.execute(statement)\n"
        "        except asyncpg.InsufficientPrivilegeError:\n"
        "            print('refused')\n"
        "asyncio.run(main())\n"
    )
    assert compose.python("billing", code).split() == ["billing", "refused", "refused"]


async def test_the_job_is_charged_what_it_was_quoted(client: Client, tuned: Tuned) -> None:
    charge = await settled(client, tuned.job.name)
    assert (
        tuned.quoted_nanos_usd
        == tuned.job.quoted_nanos_usd
        == charge.quoted_nanos_usd
        == charge.held_nanos_usd
        == charge.charged_nanos_usd
        > 0
    )
    balance = await client.billing.balance()
    assert balance.held_nanos_usd == 0
    assert tuned.job.progress.validation_loss < tuned.job.progress.initial_validation_loss


async def test_both_doors_answer_with_the_tuned_model(client: Client, tuned: Tuned) -> None:
    await registered(client, tuned.job)
    greedy = sampling(temperature=0.0, output_tokens_max=8)
    by_grpc = await client.chat.answer(tuned.job.output_model, [user(QUESTION)], greedy)
    assert by_grpc.revision == tuned.job.output_revision
    async with openai.AsyncOpenAI(
        base_url=client.config.http_url, api_key=client.config.api_key, timeout=240
    ) as compatible:
        by_http = await compatible.chat.completions.create(
            model=tuned.job.output_model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=8,
        )
        listed = {model.id async for model in await compatible.models.list()}
    assert by_http.choices[0].message.content == by_grpc.choices[0].message.content
    assert {BASE, tuned.job.output_model} <= listed


async def test_weights_come_whole(client: Client, tuned: Tuned, tmp_path: Path) -> None:
    await registered(client, tuned.job)
    model = await client.models.get(tuned.job.output_model)
    paths = await client.models.download(tuned.job.output_model, tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in paths}
    expected = {file.path: file.sha256 for file in model.files}
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths} == expected


async def test_volumes_keep_what_was_acknowledged(compose: Compose, client: Client, tuned: Tuned) -> None:
    """As in an upgrade: every container goes and new ones come; keys, jobs, money and weights stay."""
    charge = await settled(client, tuned.job.name)
    await registered(client, tuned.job)
    await asyncio.to_thread(compose.must, "down", "--timeout", "60", timeout_s=300)
    await asyncio.to_thread(compose.up)
    # A new channel: the old one may sit out its pause between attempts to connect.
    async with Client(client.config) as again:
        assert (await again.jobs.get(tuned.job.name)).state == pb.TUNING_JOB_STATE_SUCCEEDED
        assert await again.billing.job_charge(tuned.job.name) == charge
        assert (await again.models.get(tuned.job.output_model)).revision == tuned.job.output_revision
    refused = await asyncio.to_thread(
        compose.run, "exec", "-T", "gateway", "python", "-m", "services.gateway.bootstrap"
    )
    assert refused.returncode == 1
    assert "--new-key" in refused.stderr


async def settled(client: Client, name: str) -> billing_service_pb2.GetJobChargeResponse:
    look = partial(client.billing.job_charge, name)
    return await eventually(look, lambda charge: charge.settled, within_s=SETTLE_TIMEOUT_S)


async def registered(client: Client, job: pb.TuningJob) -> None:
    async def found() -> bool:
        try:
            await client.models.get(job.output_model)
        except NotFound:
            return False
        return True

    await eventually(found, within_s=SETTLE_TIMEOUT_S)
