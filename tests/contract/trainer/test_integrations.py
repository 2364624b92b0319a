"""What an attempt tells places outside of the mesh: curves by the real wandb library,
the model by the real hub library.

Real agents and the real programs beside them with a scripted child; the libraries take seconds to load, which is what
this file costs. None of these places can make a job fail, and no secret lies or is told anywhere.
"""

import base64
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_secrets_pb2
from tests.contract.trainer.world import AgentWorld, eventually
from tests.harness.files import files_left
from tests.harness.hub import Hub, running_hub
from tests.harness.wandb_server import WandbServer, running_wandb

WANDB_KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
HUB_TOKEN = "hf_token-77ab03e5"
REPOSITORY = "acme/tuned"
AWAY = "http://127.0.0.1:9"
SLOW_S = 90.0
# Of a .wandb file, which is a LevelDB log: a head, then records in parts that never cross a block.
HEAD_BYTES, BLOCK_BYTES, PART_HEAD = 7, 32768, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(HUB_TOKEN) as running:
        yield running


@pytest.fixture
def wandb() -> Iterator[WandbServer]:
    with running_wandb(WANDB_KEY) as running:
        yield running


def assignment(
    world: AgentWorld,
    *,
    wandb: str = "",
    push: bool = False,
    token: int = 7,
    hub_token: str = HUB_TOKEN,
    **script: Any,
) -> node_pb2.Assignment:
    made = world.assignment(world.script(**{"steps": 4, **script}), token=token)
    if wandb:
        made.spec.integrations.wandb.base_url = wandb
        made.spec.integrations.wandb.project = "curves"
        made.spec.integrations.wandb.run_name = "night"
    if push:
        made.spec.integrations.hub_push.repository = REPOSITORY
    world.scheduler.secrets[made.lease.tuning_job] = tuning_secrets_pb2.TuningSecrets(
        wandb_api_key=WANDB_KEY, hub_token=hub_token
    )
    return made


def warnings(world: AgentWorld) -> list[str]:
    return [warning for request in world.scheduler.of("progress") for warning in request.warnings]


def records(path: Path) -> Iterator[Any]:
    """The records of a run file, as the library itself defines them."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = path.read_bytes(), HEAD_BYTES, b""
    while at + PART_HEAD.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < PART_HEAD.size:
            at += left
            continue
        _, size, kind = PART_HEAD.unpack_from(content, at)
        at += PART_HEAD.size
        record += content[at : at + size]
        at += size
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def assert_hidden(world: AgentWorld, *secrets: str) -> None:
    """In no file that the agent or its programs left, logs included, and in no report."""
    told = "".join(str(request) for kind, request in world.scheduler.reports if kind != "secrets")
    for path, content in files_left(world.folder):
        for secret in secrets:
            for form in (secret, _base64(secret), _base64(f"api:{secret}")):
                assert form.encode() not in content, path
                assert form not in told


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode().rstrip("=")


async def test_curves_reach_the_server_that_the_job_names(world: AgentWorld, wandb: WandbServer) -> None:
    await world.start_agent(wandb_finish_s_max=SLOW_S)
    await world.scheduler.assign(assignment(world, wandb=wandb.url))
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    assert finish.WhichOneof("result") == "succeeded"
    await eventually(lambda: "acme/curves/ft-1" in wandb.complete, SLOW_S)
    points = wandb.history["acme/curves/ft-1"]
    assert [(point["_step"], point["train/loss"]) for point in points] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert warnings(world) == []
    # Nothing of this machine but the curves, and the files of the attempt are gone.
    sent = b"".join(wandb.bodies)
    assert str(world.folder).encode() not in sent
    assert sys.executable.encode() not in sent
    await eventually(lambda: not world.work.exists() or not list(world.work.iterdir()), SLOW_S)
    assert_hidden(world, WANDB_KEY)


async def test_a_wrong_key_is_a_warning_without_it(world: AgentWorld) -> None:
    with running_wandb("another-key") as server:
        await world.start_agent(wandb_init_s_max=10)
        script: dict[str, Any] = {"steps": 100_000, "checkpoint_every": 10, "step_s": 0.05}
        await world.scheduler.assign(assignment(world, wandb=server.url, **script))
        await world.scheduler.wait_until(lambda: bool(warnings(world)), SLOW_S)
        assert warnings(world)[0].startswith("WANDB_FAILED: ")
        await world.scheduler.cancel(7)
        await world.scheduler.wait_for("finish")
        assert_hidden(world, WANDB_KEY)


async def test_curves_are_written_and_can_be_read_back(world: AgentWorld) -> None:
    await world.start_agent(wandb_offline=True, wandb_finish_s_max=SLOW_S)
    await world.scheduler.assign(assignment(world, wandb=AWAY))
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    assert finish.WhichOneof("result") == "succeeded"
    found: list[Path] = []

    def is_whole() -> bool:
        found[:] = (world.folder / "data" / "wandb").glob("offline-run-*-ft-1/run-ft-1.wandb")
        return bool(found) and any(record.HasField("exit") for record in records(found[0]))

    await eventually(is_whole, SLOW_S)
    (path,) = found
    points = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]
    assert [(point["_step"], point["train/loss"]) for point in points] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert [point["train/tokens"] for point in points] == [10, 20, 30, 40]
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name, run.run_id, run.host) == ("curves", "night", "ft-1", "finemesh")
    config = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert config["base_model"] == "finemesh/tiny"
    assert "integrations" not in config
    assert warnings(world) == []
    assert_hidden(world, WANDB_KEY, HUB_TOKEN)


async def test_a_server_that_is_away_costs_the_curves_only(world: AgentWorld) -> None:
    await world.start_agent(wandb_init_s_max=1, wandb_finish_s_max=0.1)
    await world.scheduler.assign(assignment(world, wandb=AWAY, steps=100_000, checkpoint_every=10, step_s=0.05))
    await world.scheduler.wait_until(lambda: bool(warnings(world)), SLOW_S)
    (warning,) = warnings(world)
    assert warning.startswith("WANDB_FAILED: Weights & Biases gets no curves: ")
    reached = len(world.scheduler.of("commit"))
    await world.scheduler.wait_for("commit", reached + 2)
    await world.scheduler.cancel(7)
    assert (await world.scheduler.wait_for("finish")).WhichOneof("result") == "stopped"
    # One that ends while nobody knows yet that the server is away.
    await world.scheduler.assign(assignment(world, wandb=AWAY, token=8))
    assert (await world.scheduler.wait_for("finish", 2)).WhichOneof("result") == "succeeded"
    assert_hidden(world, WANDB_KEY)


async def test_the_model_is_pushed_before_the_job_succeeds(world: AgentWorld, hub: Hub) -> None:
    await world.start_agent(hub_endpoint=hub.url)
    await world.scheduler.assign(assignment(world, push=True))
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    repository = hub.repositories[REPOSITORY]
    assert set(repository.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert repository.private
    assert finish.succeeded.lineage["hub.repository"] == REPOSITORY
    assert finish.succeeded.lineage["hub.commit"] == repository.commits[-1][0]
    assert [request.lease_token for request in world.scheduler.of("secrets")] == [7]
    assert warnings(world) == []
    assert_hidden(world, HUB_TOKEN, WANDB_KEY)


@pytest.mark.parametrize(("hub_token", "why"), [("hf_wrong-5150", "the hub answered 401"), ("", "no token is known")])
async def test_a_push_that_fails_is_a_warning(world: AgentWorld, hub: Hub, hub_token: str, why: str) -> None:
    await world.start_agent(hub_endpoint=hub.url)
    await world.scheduler.assign(assignment(world, push=True, hub_token=hub_token))
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    assert finish.WhichOneof("result") == "succeeded"
    assert "hub.commit" not in finish.succeeded.lineage
    (warning,) = warnings(world)
    assert warning.startswith(f"HUB_PUSH_FAILED: the model is not in {REPOSITORY}: {why}")
    if hub_token:
        assert_hidden(world, hub_token)


async def test_an_agent_that_dies_while_it_pushes_leaves_one_commit_in_the_end(world: AgentWorld, hub: Hub) -> None:
    first = await world.start_agent(hub_endpoint=hub.url)
    # The hub takes the commit, and the agent never hears of it.
    hub.before = lambda path: first.kill() if "/commit/" in path and first.returncode is None else None
    await world.scheduler.assign(assignment(world, push=True, token=1))
    await first.wait()
    hub.before = lambda path: None
    await world.scheduler.withdraw(1)
    await world.start_agent(hub_endpoint=hub.url)
    await world.scheduler.assign(assignment(world, push=True, token=2))
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    repository = hub.repositories[REPOSITORY]
    filled = [oid for oid, files in repository.commits if files]
    assert len(filled) == 1
    assert finish.succeeded.lineage["hub.commit"] in {oid for oid, _ in repository.commits}


async def test_a_job_without_integrations_asks_for_no_secrets(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(assignment(world))
    await world.scheduler.wait_for("finish")
    assert world.scheduler.of("secrets") == []


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": "model.*q_proj", "alpha_pattern": {"q_.*": 4}}


def adapter_files(config: dict[str, Any] = CONFIG, fill: bytes = b"\0") -> dict[str, bytes]:
    """A whole adapter of one layer. Its bytes are text, which the scripted child can tell."""
    shapes = {"A": [2, 4], "B": [4, 2]}
    header = json.dumps(
        {
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": {
                "dtype": "F32", "shape": shapes[side], "data_offsets": [at * 32, at * 32 + 32],
            }
            for at, side in enumerate("AB")
        }
    ).encode().ljust(320)  # fmt: skip
    weights = struct.pack("<Q", len(header)) + header + fill * 64
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


ADAPTER_FILES = adapter_files()


async def test_a_run_starts_from_a_repository_at_one_commit(world: AgentWorld, hub: Hub) -> None:
    first = hub.repository("acme/start", {**ADAPTER_FILES, "run.py": b"import os"})
    hub.needs_token.add("acme/start")
    await world.start_agent(hub_endpoint=hub.url)
    made = assignment(world)
    made.start_from.hub.repository = "acme/start"
    await world.scheduler.assign(made)
    finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
    assert finish.WhichOneof("result") == "succeeded", finish
    started = json.loads(finish.succeeded.lineage["started_from"])
    assert (started["repository"], started["revision"]) == ("acme/start", first)
    held = {name: content.encode() for name, content in started["held"].items()}
    assert held.keys() == ADAPTER_FILES.keys()
    assert held["adapter_model.safetensors"] == ADAPTER_FILES["adapter_model.safetensors"]
    # The same adapter without a stranger's expressions: whoever reads it matches none.
    plain = json.loads(held["adapter_config.json"])
    assert plain["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert plain["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 4}
    assert [request.hub_commit for request in world.scheduler.of("start")] == [first]
    assert_hidden(world, HUB_TOKEN, WANDB_KEY)
    # The branch has moved; a later attempt is told the commit, and gets the very same files.
    hub.repository("acme/start", {"adapter_model.safetensors": adapter_files(fill=b"a")["adapter_model.safetensors"]})
    again = assignment(world, token=8)
    again.start_from.hub.repository, again.start_from.hub.revision = "acme/start", first
    await world.scheduler.assign(again)
    finish = await world.scheduler.wait_for("finish", 2, SLOW_S)
    assert json.loads(finish.succeeded.lineage["started_from"]) == started


@pytest.mark.parametrize(
    ("files", "hub_token", "reason", "said"),
    [
        (ADAPTER_FILES, "hf_wrong-5150", "MODEL_UNKNOWN", "the hub answered 401"),
        ({"model.safetensors": b"w", "config.json": b"{}"}, HUB_TOKEN, "MODEL_INVALID", "it holds a whole model"),
        (
            adapter_files(CONFIG | {"init_lora_weights": "pissa"}),
            HUB_TOKEN,
            "MODEL_INVALID",
            "init_lora_weights is 'pissa' (PiSSA",
        ),
        (
            ADAPTER_FILES | {"adapter_model.safetensors": b"no header"},
            HUB_TOKEN,
            "MODEL_INVALID",
            "is no safetensors file",
        ),
        (adapter_files(CONFIG | {"target_modules": "((.)+)+X"}), HUB_TOKEN, "MODEL_INVALID", "5 s to match"),
    ],
    ids=["token", "kind", "pissa", "torn", "endless"],
)
async def test_a_run_whose_start_cannot_be_had_fails_by_the_users_hand(
    world: AgentWorld, hub: Hub, files: dict[str, bytes], hub_token: str, reason: str, said: str
) -> None:
    hub.repository("acme/start", files)
    hub.needs_token.add("acme/start")
    await world.start_agent(hub_endpoint=hub.url)
    made = assignment(world, hub_token=hub_token)
    made.start_from.hub.repository = "acme/start"
    await world.scheduler.assign(made)
    failed = (await world.scheduler.wait_for("finish", 1, SLOW_S)).failed
    assert (failed.error.reason, failed.error.platform_fault, failed.retryable) == (reason, False, False)
    assert said in failed.error.message
    assert said in failed.error.metadata["spec.from_hub"]
    assert_hidden(world, hub_token)


async def test_a_hub_that_is_away_costs_an_attempt_but_not_the_job(world: AgentWorld) -> None:
    await world.start_agent(hub_endpoint=AWAY, hub_pull_attempts_max=1)
    made = assignment(world)
    made.start_from.hub.repository = "acme/start"
    await world.scheduler.assign(made)
    failed = (await world.scheduler.wait_for("finish", 1, SLOW_S)).failed
    assert (failed.error.reason, failed.error.platform_fault, failed.retryable) == (
        "DEPENDENCY_UNAVAILABLE",
        True,
        True,
    )
