"""The parts of the launcher that need no server: table, ports, environment, data folder, output."""

import asyncio
import contextlib
import os
import socket
import threading
from graphlib import CycleError
from io import StringIO
from pathlib import Path

import pytest

from deploy.bus_users import USERS
from deploy.local import process_output as output_module
from deploy.local.environment import Facts, environment_of, listeners
from deploy.local.folder import DataFolder, StackRunning
from deploy.local.ports import HOST, PORT_MAX, PORT_MIN, PortClaims, is_free
from deploy.local.postgres import role_statements
from deploy.local.postgres_programs import open_copy, open_to_others
from deploy.local.process_output import Output
from deploy.local.table import NATS, POSTGRES, SERVICES, Service, start_order


def test_order_puts_everything_after_what_it_needs() -> None:
    order = start_order(SERVICES)
    assert set(order) == {POSTGRES, NATS, "gateway", "scheduler", "trainer", "billing", "inference"}
    for service in SERVICES:
        assert all(order.index(need) < order.index(service.name) for need in service.needs)


def test_circle_is_refused() -> None:
    one = Service(name="one", module="m", needs=("two",))
    two = Service(name="two", module="m", needs=("one",))
    with pytest.raises(CycleError):
        start_order([one, two])


def test_ports_are_free_distinct_claimed_and_kept(tmp_path: Path) -> None:
    claims, others = PortClaims(tmp_path), PortClaims(tmp_path)
    first = claims.pick(["a", "b", "c"], {})
    assert len(set(first.values())) == 3
    assert all(PORT_MIN <= port < PORT_MAX and is_free(port) for port in first.values())
    assert not set(others.pick(["a", "b", "c"], first).values()) & set(first.values()), "claimed though not bound"
    claims.release()
    assert claims.pick(["c", "a", "b"], first) == first
    claims.release()
    with socket.socket() as taken:
        taken.bind((HOST, first["b"]))
        taken.listen()
        second = claims.pick(["a", "b", "c"], first)
    assert second["a"] == first["a"]
    assert second["b"] != first["b"]


def _facts(tmp_path: Path) -> Facts:
    keys = [key for service in SERVICES for node in range(2) for key in listeners(service, node)]
    return Facts(
        ports={key: 20_000 + number for number, key in enumerate(dict.fromkeys(keys))},
        database_urls={name: f"postgresql://{name}" for name in ("gateway", "scheduler", "billing", "inference")},
        secrets={name: "k" * 48 for service in SERVICES for name in service.secret_variables},
        nats_urls={user: f"nats://{user}:secret@127.0.0.1:1" for user in USERS},
        tls_dir=tmp_path / "tls",
        artifacts_dir=tmp_path / "artifacts",
        data_dir=tmp_path,
        engine="stub",
        log_format="json",
    )


def test_each_service_is_told_its_own_and_everybodys_addresses(tmp_path: Path) -> None:
    facts = _facts(tmp_path)
    by_name = {service.name: service for service in SERVICES}
    gateway = environment_of(by_name["gateway"], 0, SERVICES, facts)
    assert gateway["FINEMESH_GATEWAY_LISTEN_ADDRESS"] == f"127.0.0.1:{facts.ports['gateway']}"
    assert gateway["FINEMESH_GATEWAY_PUBLIC_ADDRESS"] == f"127.0.0.1:{facts.ports['gateway.PUBLIC']}"
    assert gateway["FINEMESH_GATEWAY_HTTP_ADDRESS"] == f"127.0.0.1:{facts.ports['gateway.HTTP']}"
    both = [f"127.0.0.1:{facts.ports[name]}" for name in ("scheduler", "scheduler-1")]
    assert gateway["FINEMESH_SCHEDULER_ADDRESS"] == ",".join(both)
    doors = [f"127.0.0.1:{facts.ports[name]}" for name in ("scheduler.AGENTS", "scheduler-1.AGENTS")]
    assert gateway["FINEMESH_SCHEDULER_AGENTS_ADDRESS"] == ",".join(doors)
    # Where it listens is its own.
    replica = environment_of(by_name["scheduler"], 1, SERVICES, facts)
    assert replica["FINEMESH_SCHEDULER_AGENTS_ADDRESS"] == doors[1]
    assert replica["FINEMESH_SCHEDULER_LISTEN_ADDRESS"] == both[1]
    assert gateway["FINEMESH_GATEWAY_DATABASE_URL"] == "postgresql://gateway"
    assert not any("DATABASE_URL" in name and "GATEWAY" not in name for name in gateway), "others' passwords are theirs"
    assert "FINEMESH_SCHEDULER_SECRETS_KEY" not in gateway
    scheduler = environment_of(by_name["scheduler"], 0, SERVICES, facts)
    assert scheduler["FINEMESH_SCHEDULER_SECRETS_KEY"] == "k" * 48
    assert gateway["FINEMESH_ARTIFACTS_URL"] == (tmp_path / "artifacts").as_uri()
    second = environment_of(by_name["trainer"], 1, SERVICES, facts)
    assert second["FINEMESH_TRAINER_NODE_NAME"] == "local-1"
    assert second["FINEMESH_TRAINER_LISTEN_ADDRESS"] == f"127.0.0.1:{facts.ports['trainer-1']}"
    assert second["FINEMESH_TRAINER_ADDRESS"] == f"127.0.0.1:{facts.ports['trainer-0']}"
    assert second["FINEMESH_TRAINER_WORK_DIR"].endswith("trainer-1")
    assert "FINEMESH_TRAINER_DATABASE_URL" not in second


def test_folder_belongs_to_one_stack(tmp_path: Path) -> None:
    first, second = DataFolder(tmp_path), DataFolder(tmp_path)
    assert second.holder() is None
    first.acquire()
    with pytest.raises(StackRunning, match="already"):
        second.acquire()
    assert second.holder() is not None
    first.state_file.touch()
    second.release()
    assert first.state_file.exists(), "who has no lock changes nothing"
    first.release()
    assert not first.state_file.exists()
    second.acquire()
    second.release()


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    first = folder.secrets(["a", "b"])
    assert len({*first.values()}) == 2
    assert all(len(secret) >= 32 for secret in first.values())
    again = folder.secrets(["a", "b", "c"])
    assert {name: again[name] for name in first} == first
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_folders_with_what_tenants_brought_are_private_also_those_of_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    mode = tmp_path.stat().st_mode
    folder = DataFolder(tmp_path)
    folder.acquire()
    try:
        for name in ("artifacts", "cache", "logs", "nats"):
            assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
        assert tmp_path.stat().st_mode == mode, "it may be somebody else's"
    finally:
        folder.release()


def test_role_names_and_passwords_cannot_carry_sql() -> None:
    for role, password in (("a; drop", "x"), ("a", "x' OR")):
        with pytest.raises(AssertionError):
            role_statements(role, password)


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


async def test_output_goes_to_file_and_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "LINE_BYTES_MAX", 32)
    monkeypatch.setattr(output_module, "FILE_BYTES_MAX", 100)
    terminal = StringIO()
    output = Output("billing", tmp_path, terminal)
    reader = asyncio.StreamReader()
    reader.feed_data(b"one\ntwo " + b"\xff" + b"\n" + b"x" * 100 + b"\nlast")
    reader.feed_eof()
    await output.copy(reader)
    shown = terminal.getvalue().splitlines()
    assert shown[0].endswith("| one")
    assert shown[-1].endswith("last")
    assert all(line.startswith("billing") for line in shown)
    assert output.tail(1) == "last"
    for number in range(50):
        output.write(b"line %d" % number)
    output.close()
    assert _size_bytes(tmp_path) < 300, "the files stay bounded"


def test_programs_in_a_closed_folder_are_copied_once_where_anybody_can_run_them(tmp_path: Path) -> None:
    programs = tmp_path / "wheel" / "bin"
    programs.mkdir(parents=True)
    (programs / "postgres").write_text("#!/bin/sh\necho 18\n")
    (programs / "postgres").chmod(0o700)
    (programs / "share").write_text("zones")
    (programs / "share").chmod(0o600)
    assert not open_to_others(programs / "postgres")
    copy = open_copy([programs.parent, tmp_path / "wheel.libs"], tmp_path / "copies" / "18.6")
    modes = {str(path.relative_to(copy)): path.stat().st_mode & 0o777 for path in (copy, *copy.rglob("*"))}
    assert modes == {
        ".": 0o755,
        "wheel": 0o755,
        "wheel/bin": 0o755,
        "wheel/bin/postgres": 0o755,
        "wheel/bin/share": 0o644,
    }
    assert programs.joinpath("postgres").stat().st_mode & 0o777 == 0o700, "the original stays as it was"
    (programs / "postgres").unlink()
    assert open_copy([programs.parent], copy) == copy, "it was made before"
    assert [path.name for path in copy.parent.iterdir()] == ["18.6"]


def test_a_terminal_that_nobody_reads_holds_nobody_up(tmp_path: Path) -> None:
    """As behind `| less`, or after Ctrl-S: its lines are in the file all the same."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            continue
    os.set_blocking(writer, True)
    with os.fdopen(writer, "w") as terminal:
        output = Output("speaker", tmp_path, terminal)
        speaking = threading.Thread(target=output.write, args=(b"hello",), daemon=True)
        speaking.start()
        speaking.join(5)
        is_held_up = speaking.is_alive()
        os.read(reader, 1 << 20)
        speaking.join()
        assert not is_held_up
        output.write(b"x" * 100_000)
        output.close()
    assert os.read(reader, 1 << 20).startswith(b"speaker      | xxx")
    os.close(reader)
    assert (tmp_path / "speaker.log").read_bytes().startswith(b"hello\nxxx")
