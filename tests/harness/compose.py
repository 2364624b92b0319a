"""The mesh in a real Docker Engine, from deploy/compose.yaml as it is: built, started,
and gone with its volumes after."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy import compose_env
from deploy.local.ports import PortClaims

DEPLOY = Path(compose_env.__file__).parent
HOST = "127.0.0.1"
# The first build fetches torch and vllm; later ones find every heavy layer in the engine's cache.
BUILD_TIMEOUT_S = 3000
START_TIMEOUT_S = 600
COMMAND_TIMEOUT_S = 120
LOG_LINES = 150


@dataclass(frozen=True, kw_only=True)
class Compose:
    """One project of compose. `environment` is that of the docker client, which fills compose.yaml's variables."""

    project: str
    secrets_file: Path
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.environment['FINEMESH_GRPC_PORT']}"

    @property
    def http_url(self) -> str:
        return f"http://{HOST}:{self.environment['FINEMESH_HTTP_PORT']}/v1"

    def run(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "--project-name", self.project, "--env-file", str(self.secrets_file)]
        return subprocess.run(
            [*command, "--file", str(DEPLOY / "compose.yaml"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def must(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """The command's output; fails the test with what the command and the containers said."""
        done = self.run(*arguments, timeout_s=timeout_s)
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-4000:]
            pytest.fail(f"docker compose {' '.join(arguments)} failed ({done.returncode}):\n{said}\n{self.logs()}")
        return done.stdout

    def up(self) -> None:
        self.must("up", "--detach", "--wait", "--no-build", timeout_s=START_TIMEOUT_S)

    def exec(self, service: str, *command: str) -> str:
        return self.must("exec", "-T", service, *command)

    def python(self, service: str, code: str) -> str:
        return self.exec(service, "python", "-c", code).strip()

    def logs(self) -> str:
        states = self.run("ps", "--all").stdout
        lines = self.run("logs", "--no-color", "--tail", str(LOG_LINES)).stdout
        return f"{states}\n{lines}"

    def bootstrap(self, *arguments: str) -> dict[str, str]:
        said = self.exec("gateway", "python", "-m", "services.gateway.bootstrap", *arguments)
        described: dict[str, str] = json.loads(said.splitlines()[-1])
        return described


def require_engine() -> None:
    """Fails, and never skips: who asked for these tests wants to know that nothing was tested."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except FileNotFoundError:
            pytest.fail("compose tests need the docker command and a Docker Engine", pytrace=False)
        if asked.returncode != 0:
            hint = "start a Docker Engine or set DOCKER_HOST"
            pytest.fail(f"compose tests need a Docker Engine: {hint}\n{asked.stderr}", pytrace=False)


@contextlib.contextmanager
def running_compose(folder: Path) -> Iterator[Compose]:
    """Everything built and healthy inside; no container, network or volume is left after."""
    require_engine()
    secrets_file = folder / "compose.env"
    compose_env.main(["--out", str(secrets_file)])
    ports = PortClaims().pick(["grpc", "http"], {})
    project = f"finemesh-test-{secrets.token_hex(4)}"
    with package_index(folder) as pip_conf:
        compose = Compose(
            project=project,
            secrets_file=secrets_file,
            environment={
                # What this shell has set for another mesh would win over the file.
                **{name: value for name, value in os.environ.items() if not name.startswith("FINEMESH_")},
                "COMPOSE_PROGRESS": "plain",
                "FINEMESH_VERSION": "test",
                "FINEMESH_PIP_CONF": str(pip_conf),
                "FINEMESH_BUILD_NETWORK": "host",
                "FINEMESH_GRPC_PORT": str(ports["grpc"]),
                "FINEMESH_HTTP_PORT": str(ports["http"]),
                "FINEMESH_HEALTH_INTERVAL": "3s",
            },
        )
        # One service per image, one after the other: each build wants all cores.
        for service in ("certificates", "trainer", "inference"):
            compose.must("build", service, timeout_s=BUILD_TIMEOUT_S)
    try:
        compose.up()
        yield compose
    finally:
        compose.run("down", "--volumes", "--timeout", "30", timeout_s=START_TIMEOUT_S)


@contextlib.contextmanager
def package_index(folder: Path) -> Iterator[Path]:
    """A pip.conf for the build that knows the wheels of this machine's PIP_FIND_LINKS,
    which lie where no image sees them."""
    with contextlib.ExitStack() as ending:
        links = [
            ending.enter_context(serving(Path(entry))) if Path(entry).is_dir() else entry
            for entry in os.environ.get("PIP_FIND_LINKS", "").split()
        ]
        pip_conf = folder / "pip.conf"
        lines = ["[global]", f"trusted-host = {HOST}", "find-links =", *(f"    {link}" for link in links)]
        pip_conf.write_text("\n".join(lines) + "\n" if links else "", encoding="utf-8")
        yield pip_conf


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """A served wheel is no news."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The folder as a page of links, on this machine only."""
    with ThreadingHTTPServer((HOST, 0), functools.partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
