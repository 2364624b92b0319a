"""The mesh on one machine: PostgreSQL, nats-server and the services of the table, alive between start and stop.

The command line, the demo and the tests use this same class. It knows the table, not what any service does.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from chassis import pki
from deploy import bus_users
from deploy.certificates import hand_over
from deploy.local.broker import Broker
from deploy.local.bus_watch import BusWatch
from deploy.local.child import Command
from deploy.local.disk_room import has_room
from deploy.local.environment import Facts, address, certificate_name, environment_of, listeners, process_name
from deploy.local.folder import DataFolder, write_private
from deploy.local.health import OPERATOR, health_of, wait_serving
from deploy.local.postgres import DATABASE, Postgres
from deploy.local.process_output import Output, show
from deploy.local.supervisor import ProcessFailed, Supervised
from deploy.local.table import NATS, POSTGRES, SERVICES, Service, start_order

START_TIMEOUT_S = 180.0
BOOTSTRAP_TIMEOUT_S = 60.0
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """`engine` is what the inference service is told, None for its default; `environment` reaches every service.

    `replicas` has the number of processes of a service that runs more than one; peers are told of all of them. `rewire`
    gets a process's name and environment, and what it returns goes over that. `terminal` gets the services' lines and
    `tell` the launcher's own; None keeps them in the files.
    """

    data: Path
    engine: str | None = None
    nodes: int = 1
    replicas: Mapping[str, int] = field(default_factory=dict)
    services: tuple[Service, ...] = SERVICES
    environment: Mapping[str, str] = field(default_factory=dict)
    rewire: Callable[[str, Mapping[str, str]], Mapping[str, str]] = lambda name, environment: {}
    terminal: TextIO | None = None
    notices: TextIO | None = None
    log_format: str = "console"


class Stack:
    """`async with Stack(StackOptions(data=folder)) as stack:` - all healthy inside, all gone after."""

    def __init__(self, options: StackOptions) -> None:
        assert options.nodes >= 1
        self._options = options
        self.folder = DataFolder(options.data)
        self._processes: dict[str, Supervised] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[None] | None = None
        self._bus_watch: asyncio.Task[None] | None = None
        self._facts: Facts | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when everything is healthy; StackRunning, ProcessFailed or TimeoutError,
        with nothing left running."""
        self.folder.acquire()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._failed = asyncio.get_running_loop().create_future()
                await self._begin()
                await self.wait_healthy()
                await self._bootstrap()
            self._write_state()
            self._bus_watch = asyncio.create_task(self._watch_bus())
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends every process after those that need it or report to it, then frees the data folder."""
        if self._bus_watch is not None:
            self._bus_watch.cancel()
            await asyncio.gather(self._bus_watch, return_exceptions=True)
        needed_by = {
            name: [other for other in self._processes if name in self._outlived_by(other)] for name in self._processes
        }
        stopping: dict[str, asyncio.Task[None]] = {}

        async def stop_one(name: str) -> None:
            await asyncio.gather(*(stopping[other] for other in needed_by[name]))
            await self._processes[name].stop()
            self._tasks[name].cancel()
            await asyncio.gather(self._tasks[name], return_exceptions=True)

        stopping.update({name: asyncio.create_task(stop_one(name)) for name in self._processes})
        await asyncio.gather(*stopping.values())
        self._processes.clear()
        self._tasks.clear()
        if self._failed is not None and self._failed.done():
            self._failed.exception()  # whoever waits for it has it; nobody else needs to hear of it
        self.folder.release()

    def kill_all(self) -> None:
        """Ends everything at once; `stop` still has to be awaited."""
        for process in self._processes.values():
            process.kill()

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signals one process, as a crash would, and returns its process id; the stack starts it again."""
        process = self._processes[name]
        pid = process.pid
        if pid is None:
            raise ProcessLookupError(f"{name} does not run now")
        process.send(number)
        return pid

    def pid(self, name: str) -> int | None:
        return self._processes[name].pid

    def restarts(self, name: str) -> int:
        return self._processes[name].restarts

    async def wait_healthy(self, name: str | None = None, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the named process, or every one, is healthy; ProcessFailed when one cannot be kept alive."""
        assert self._failed is not None
        wanted = list(self._processes.values()) if name is None else [self._processes[name]]
        everyone = asyncio.gather(*(process.healthy.wait() for process in wanted))
        try:
            async with asyncio.timeout(timeout_s):
                either: set[asyncio.Future[Any]] = {everyone, self._failed}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            late = ", ".join(process.name for process in wanted if not process.healthy.is_set())
            raise TimeoutError(f"not healthy after {timeout_s:.0f} s: {late}; see {self.folder.logs}") from None
        finally:
            everyone.cancel()
            with suppress(asyncio.CancelledError):
                await everyone
        if self._failed.done():
            self._failed.result()

    async def wait_failed(self) -> None:
        """Never returns; raises ProcessFailed when a process cannot be kept alive."""
        assert self._failed is not None
        await asyncio.shield(self._failed)

    @property
    def addresses(self) -> dict[str, str]:
        """host:port by process, and by `<service>.<DOOR>`."""
        assert self._facts is not None
        return {key: address(self._facts, key) for key in self._facts.ports}

    def environment(self, name: str) -> dict[str, str]:
        """What the named service of the table is told, for a test or tool that stands in for it."""
        assert self._facts is not None
        service = next(service for service in self._options.services if service.name == name)
        return environment_of(service, 0, self._options.services, self._facts)

    @property
    def bus_url(self) -> str:
        """The bus with all rights, for tests and tools; services have their own users."""
        assert self._facts is not None
        return self._facts.nats_urls[bus_users.OPERATOR]

    def describe(self) -> dict[str, Any]:
        """The content of stack.json and of the launcher's ready line."""
        described: dict[str, Any] = {
            "data": str(self.folder.root),
            "launcher_pid": os.getpid(),
            "addresses": self.addresses,
            "pids": {name: process.pid for name, process in self._processes.items()},
            "tls_dir": str(self.folder.tls),
            "logs_dir": str(self.folder.logs),
            "api_key_file": str(self.folder.api_key_file),
        }
        for service in self._options.services:
            if service.doors:
                described["public_grpc"] = self.addresses[f"{service.name}.PUBLIC"]
                described["http_url"] = f"http://{self.addresses[f'{service.name}.HTTP']}"
        return described

    def _outlived_by(self, name: str) -> tuple[str, ...]:
        """What ends after the named process: all that it needs or reports to."""
        return next(
            (
                (*service.needs, *service.reports_to)
                for service, node in self._members()
                if process_name(service, node) == name
            ),
            (),
        )

    def _members(self) -> list[tuple[Service, int]]:
        """Each service once, or once per replica or node."""
        order = start_order(self._options.services)
        services = sorted(self._options.services, key=lambda service: order.index(service.name))
        replicas = self._options.replicas
        return [
            (service, number)
            for service in services
            for number in range(self._options.nodes if service.per_node else replicas.get(service.name, 1))
        ]

    async def _begin(self) -> None:
        folder, services = self.folder, self._options.services
        keys = [key for service, node in self._members() for key in listeners(service, node)]
        ports = folder.ports([POSTGRES, NATS, *keys])
        roles = [service.name for service in services if service.database]
        own = [name for service in services for name in service.secret_variables]
        of_bus = {user: f"{NATS}.{user}" for user in bus_users.USERS}
        secrets = folder.secrets([POSTGRES, *of_bus.values(), *roles, *own])
        postgres = Postgres(folder=folder.postgres, port=ports[POSTGRES], password=secrets[POSTGRES])
        passwords = {user: secrets[key] for user, key in of_bus.items()}
        broker = Broker(folder=folder.nats, port=ports[NATS], passwords=passwords)
        self._start_infrastructure(postgres, broker, {role: secrets[role] for role in roles})
        await asyncio.to_thread(self._certify)
        self._facts = Facts(
            ports=ports,
            database_urls={role: postgres.url(role=role, password=secrets[role], database=DATABASE) for role in roles},
            secrets={name: secrets[name] for name in own},
            nats_urls={user: broker.url(user) for user in bus_users.USERS},
            tls_dir=folder.tls,
            artifacts_dir=folder.artifacts,
            data_dir=folder.root,
            engine=self._options.engine,
            log_format=self._options.log_format,
        )
        for service, node in self._members():
            self._start_service(service, node, self._facts)

    def _start_infrastructure(self, postgres: Postgres, broker: Broker, passwords: Mapping[str, str]) -> None:
        async def database_ready() -> None:
            await postgres.wait_ready()
            await postgres.ensure_roles(passwords)

        # Their lines stay in the files: they speak much and matter only when something is wrong.
        self._supervise(postgres.command(), None, prepare=postgres.initialise, wait_ready=database_ready)
        self._supervise(broker.command(), None, wait_ready=broker.wait_ready)

    def _start_service(self, service: Service, node: int, facts: Facts) -> None:
        name = process_name(service, node)
        credentials = pki.load(facts.tls_dir, OPERATOR)
        self._supervise(
            Command(
                name=name,
                arguments=(sys.executable, "-m", service.module),
                folder=self.folder.root,
                environment=self._environment(service, node, facts),
            ),
            self._options.terminal,
            needs=service.needs,
            wait_ready=lambda: wait_serving(credentials, address(facts, name), service.name),
        )

    async def _watch_bus(self) -> None:
        facts = self._facts
        assert facts is not None
        credentials = pki.load(facts.tls_dir, OPERATOR)
        async with AsyncExitStack() as connections:
            asks = [
                await connections.enter_async_context(
                    health_of(credentials, address(facts, process_name(service, number)), service.name)
                )
                for service, number in self._members()
                if NATS in service.needs
            ]
            await BusWatch(self._processes[NATS], asks, has_room=self._has_room, tell=self._tell).run()

    def _has_room(self) -> bool:
        return has_room(self.folder.root)

    def _environment(self, service: Service, node: int, facts: Facts) -> dict[str, str]:
        told = environment_of(service, node, self._options.services, facts)
        # A checkout that nobody installed works too: the proto root and the client are Python roots of their own.
        roots = [str(_SOURCE_ROOT / part) for part in ("", "gen", "client")]
        path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
        # The data folder is the working folder; what lies there must not be importable.
        told |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", **self._options.environment}
        return {**told, **self._options.rewire(process_name(service, node), told)}

    def _supervise(
        self, command: Command, terminal: TextIO | None, *, needs: tuple[str, ...] = (), **callbacks: Any
    ) -> None:
        process = Supervised(
            command,
            Output(command.name, self.folder.logs, terminal),
            needs=[self._processes[need] for need in needs],
            tell=self._tell,
            has_room=self._has_room,
            **callbacks,
        )
        self._processes[process.name] = process
        task = asyncio.create_task(process.run(), name=process.name)
        task.add_done_callback(self._on_end)
        self._tasks[process.name] = task

    def _on_end(self, task: asyncio.Task[None]) -> None:
        assert self._failed is not None
        if task.cancelled() or task.exception() is None or self._failed.done():
            return
        self._failed.set_exception(task.exception() or ProcessFailed(task.get_name()))

    def _certify(self) -> None:
        pki.create_authority(self.folder.tls)
        pki.issue(self.folder.tls, OPERATOR)
        for service, number in self._members():
            name = certificate_name(service, number)
            pki.issue(self.folder.tls, name)
            if service.per_node:
                hand_over(self.folder.tls, name, self.folder.tls / name)

    async def _bootstrap(self) -> None:
        """Runs what a service wants run once, and keeps the one line of JSON that it prints."""
        assert self._facts is not None
        for service in self._options.services:
            if service.bootstrap is None or self.folder.api_key_file.exists():
                continue
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                service.bootstrap,
                cwd=self.folder.root,
                env={**os.environ, **self._environment(service, 0, self._facts)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(BOOTSTRAP_TIMEOUT_S):
                said, complained = await process.communicate()
            lines = said.decode(errors="replace").strip().splitlines()
            if process.returncode != 0 or not lines:
                raise ProcessFailed(f"{service.bootstrap} failed:\n{complained.decode(errors='replace')}")
            write_private(self.folder.api_key_file, json.loads(lines[-1]))

    def _write_state(self) -> None:
        write_private(self.folder.state_file, self.describe())

    def _tell(self, text: str) -> None:
        if self._options.notices is not None:
            show(f"finemesh     | {text}", self._options.notices)
