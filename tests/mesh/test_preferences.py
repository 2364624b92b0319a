"""Learning from preferences by the command line on the real mesh: a job, one that continues its first checkpoint, and a
model that is pushed to a hub on the way, whose token is nowhere to be found afterwards.

Earns its minute: the only place where the options of a terminal become a DPO run, and where every file of a whole
stack, its database and its logs among them, is searched for a secret.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from finemesh.tuning.v1 import tuning_job_event_pb2 as events
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.harness.files import files_left
from tests.harness.hub import Hub, running_hub
from tests.harness.mesh import BASE, Mesh, running_mesh, write_rows

TOKEN = "hf_4c1f0e77a9b2d3"
REPOSITORY = "acme/preferring"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(TOKEN) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("mesh"),
        FINEMESH_TRAINER_HUB_ENDPOINT=hub.url,
        FINEMESH_WANDB_OFFLINE="true",
        FINEMESH_LOG_LEVEL="debug",
    ) as running:
        yield running


def pairs(count: int) -> list[dict[str, object]]:
    """The preferred answer names the second word, the other one the first."""
    words = ["river", "stone", "cloud", "ember", "meadow", "harbor"]
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"{words[n % 6]} {words[(n + 1) % 6]} number {n}"}]},
            "preferred_output": [{"role": "assistant", "content": words[(n + 1) % 6]}],
            "non_preferred_output": [{"role": "assistant", "content": words[n % 6]}],
        }
        for n in range(count)
    ]


async def finemesh(mesh: Mesh, *arguments: str, **environment: str) -> dict[str, object]:
    """What the command line prints, as JSON; it must succeed."""
    told = {
        **os.environ,
        "FINEMESH_ADDRESS": mesh.client.config.address,
        "FINEMESH_API_KEY": mesh.client.config.api_key,
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from finemesh_client.cli.main import app; app()", *arguments, "--json"),
        env=told,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    document: dict[str, object] = json.loads(output)
    return document


def files_with(folder: Path, secret: str) -> list[Path]:
    """Every file under a folder that holds it, plainly or as base64."""
    forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))
    return [path for path, content in files_left(folder) if _holds(content, forms)]


def _holds(content: bytes, forms: tuple[bytes, ...]) -> bool:
    return any(form in content for form in forms)


async def test_a_base_model_from_the_hub_is_the_one_that_was_put_there(mesh: Mesh, hub: Hub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (mesh.folder / "tiny-llama").iterdir() if path.is_file()}
    commit = hub.repository("acme/tiny", {**files, "modeling_tiny.py": b"import os", "pytorch_model.bin": b"x" * 100})
    hub.repository("acme/tiny", {"tokenizer_config.json": b"{}"})
    made = await finemesh(
        mesh,
        *("models", "import", "acme/tiny", "--revision", commit),
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path),
        HF_TOKEN=TOKEN,
        HF_HUB_DISABLE_XET="1",
        # An engine that was opened in this process has taken its libraries offline.
        HF_HUB_OFFLINE="0",
    )
    assert made["model_id"] == "acme/tiny"
    assert made["source"] == f"hf:acme/tiny@{commit}"
    assert made["revision"] == (await mesh.client.models.get_base(BASE)).revision


async def test_preferences_are_learned_pushed_and_continued(mesh: Mesh, hub: Hub, tmp_path: Path) -> None:
    training = await mesh.client.files.upload(write_rows(tmp_path / "pairs.jsonl", pairs(48)))
    held_out = await mesh.client.files.upload(write_rows(tmp_path / "held-out.jsonl", pairs(12)))
    common = ("--method", "dpo", "-t", training.name, "--validation-file", held_out.name, "--batch-size", "8")
    made = await finemesh(
        mesh,
        *("jobs", "create", "-m", BASE, *common, "--rank", "4", "--dpo-beta", "0.2", "--epochs", "2"),
        *("--evaluations", "2", "--checkpoints", "2", "--learning-rate", "0.005", "--max-tokens", "64"),
        *("--name", "preferring", "--hf-push-to", REPOSITORY, "--wandb-project", "curves", "--yes", "--watch"),
        HF_TOKEN=TOKEN,
    )
    job = await mesh.client.jobs.get(str(made["name"]))
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert job.spec.dpo == pb.DpoMethod(beta=0.2)
    assert job.progress.reward_accuracy > 0.5
    assert job.progress.reward_margin > 0
    history = [event async for event in mesh.client.jobs.events(job.name)]
    told = [event for event in history if event.kind == events.TUNING_JOB_EVENT_KIND_EVALUATION]
    assert sum(event.progress.HasField("reward_margin") for event in told) == 4
    assert sum("right by a margin of" in event.message for event in told) == 4
    assert not [event.message for event in history if event.kind == events.TUNING_JOB_EVENT_KIND_WARNING]

    shipped = await mesh.adapter_sha256(job.output_model)
    pushed = hub.repositories[REPOSITORY]
    assert hashlib.sha256(pushed.files["adapter_model.safetensors"]).hexdigest() == shipped
    model = await mesh.client.models.get(job.output_model)
    assert model.lineage["hub.commit"] == pushed.commits[-1][0]

    kept = [point async for point in mesh.client.jobs.checkpoints(job.name)]
    first = min(point.step for point in kept if point.asked)
    assert first < job.progress.step
    job_id = job.name.rpartition("/")[2]
    more = await finemesh(
        mesh, "jobs", "create", "--from", f"{job_id}:{first}", *common, "--name", "preferring-more", "--yes", "--watch"
    )
    continued = await mesh.client.jobs.get(str(more["name"]))
    assert continued.state == pb.TUNING_JOB_STATE_SUCCEEDED, continued.error.message
    assert (continued.spec.base_model, continued.spec.lora.rank) == (BASE, 4)
    assert await mesh.adapter_sha256(continued.output_model) != shipped
    limits = await finemesh(mesh, "models", "limits", job_id)
    assert (limits["base_model"], limits["supports_dpo"]) == (BASE, True)

    assert await mesh.rows("scheduler", "SELECT * FROM job_secrets") == []
    assert list((mesh.folder / "data" / "wandb").glob(f"offline-run-*-{job_id}"))
    assert files_with(mesh.folder, BASE) != [], "what is searched for is found where it lies"
    assert files_with(mesh.folder, TOKEN) == []
