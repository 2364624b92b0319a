"""Compose runs the same mesh as the launcher: one table of services, one set of variables. No Docker is needed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import bucket_policies, bus_users, compose_env
from deploy.bus_users import TARGET, USERS, password_variable, users
from deploy.local.broker import Broker
from deploy.local.environment import Facts, environment_of, listeners
from deploy.local.table import NATS, POSTGRES, SERVICES, Service
from finemesh.common.v1 import event_options_pb2
from finemesh.events.v1 import (
    billing_events_pb2,
    dead_letter_events_pb2,
    endpoint_events_pb2,
    model_events_pb2,
    node_events_pb2,
    tuning_events_pb2,
    usage_events_pb2,
)

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
CERTIFICATES = "certificates"
# No service of this mesh runs clusters yet.
EVENTS = (
    billing_events_pb2,
    dead_letter_events_pb2,
    endpoint_events_pb2,
    model_events_pb2,
    node_events_pb2,
    tuning_events_pb2,
    usage_events_pb2,
)

# What the launcher needs no word for: the image says it, or compose has a knob that the launcher has as an option.
ONLY_LAUNCHER = {"PYTHONUNBUFFERED"}
ONLY_COMPOSE = {"FINEMESH_LOG_LEVEL", "FINEMESH_OTLP_ENDPOINT", "FINEMESH_TRAINER_ADVERTISED_ADDRESS"}

each_service = pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)


def described(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"][service.name]
    return found


def launched(service: Service) -> dict[str, str]:
    keys = [POSTGRES, NATS, *(key for peer in SERVICES for key in listeners(peer, 0))]
    facts = Facts(
        ports={key: 20_000 + number for number, key in enumerate(keys)},
        database_urls={peer.name: f"postgresql://{peer.name}:secret@host/finemesh" for peer in SERVICES},
        secrets={name: "secret" for peer in SERVICES for name in peer.secret_variables},
        nats_urls={user: f"nats://{user}:secret@host:4222" for user in USERS},
        tls_dir=Path("/tls"),
        artifacts_dir=Path("/artifacts"),
        data_dir=Path("/data"),
        engine="vllm" if service.name == "inference" else None,
        log_format="json",
    )
    return environment_of(service, 0, SERVICES, facts)


def test_same_services() -> None:
    assert set(COMPOSE["services"]) == {POSTGRES, NATS, CERTIFICATES, *(service.name for service in SERVICES)}


@each_service
def test_same_program(service: Service) -> None:
    assert described(service)["command"] == ["python", "-m", service.module]


@each_service
def test_same_needs(service: Service) -> None:
    needs = dict(described(service)["depends_on"])
    assert needs.pop(CERTIFICATES) == {"condition": "service_completed_successfully"}
    expected = {name: {"condition": "service_healthy"} for name in service.needs}
    # Compose stops in the reverse order of its dependencies.
    assert needs == expected | {name: {"condition": "service_started"} for name in service.reports_to}


@each_service
def test_same_variables(service: Service) -> None:
    expected = set(launched(service)) - ONLY_LAUNCHER
    assert set(described(service)["environment"]) - ONLY_COMPOSE == expected


@each_service
def test_addresses_meet(service: Service) -> None:
    """Everybody looks for a service where it listens, and every door of it has a port of its own."""
    environment = described(service)["environment"]
    listens = environment[f"{service.env_prefix}LISTEN_ADDRESS"]
    port = listens.rpartition(":")[2]
    assert {described(peer)["environment"][f"{service.env_prefix}ADDRESS"] for peer in SERVICES} == {
        f"{service.name}:{port}"
    }
    mesh_doors = []
    for door in service.mesh_doors:
        variable = f"{service.env_prefix}{door}_ADDRESS"
        mesh_doors.append(environment[variable])
        told = {described(peer)["environment"][variable] for peer in SERVICES if peer is not service}
        assert told == {f"{service.name}:{mesh_doors[-1].rpartition(':')[2]}"}
    doors = [environment[f"{service.env_prefix}{door}_ADDRESS"] for door in service.doors]
    assert len({listens, *doors, *mesh_doors}) == 1 + len(doors) + len(mesh_doors)
    published = {entry.rpartition(":")[2] for entry in described(service).get("ports", [])}
    assert published == {door.rpartition(":")[2] for door in doors}


@each_service
def test_database_url_is_its_own_role(service: Service) -> None:
    url = described(service)["environment"].get(f"{service.env_prefix}DATABASE_URL")
    password = f"${{{service.env_prefix}DATABASE_PASSWORD}}"
    assert url == (f"postgresql://{service.name}:{password}@postgres:5432/finemesh" if service.database else None)


@each_service
def test_health_is_asked_of_itself(service: Service) -> None:
    assert described(service)["healthcheck"]["test"] == ["CMD", "python", "-m", "deploy.healthcheck", service.name]


@each_service
def test_certificates_reach_their_owner_only(service: Service) -> None:
    volume = f"{service.name}-tls"
    holders = {name for name, other in COMPOSE["services"].items() if any(volume in v for v in other["volumes"])}
    assert holders == {service.name, CERTIFICATES}
    assert f"{volume}:/etc/finemesh/tls:ro" in described(service)["volumes"]
    issued = COMPOSE["services"][CERTIFICATES]
    name = service.name
    if service.per_node or service.on_first_node:
        # The certificate is that of the node that it says it works on.
        name = f"{service.name}@{described(service)['environment'][f'{service.env_prefix}NODE_NAME']}={service.name}"
    assert name in issued["command"]
    assert f"{volume}:/var/lib/finemesh/certificates/{service.name}" in issued["volumes"]


def test_fresh_volumes_get_the_owner_that_writes_them() -> None:
    """Docker gives a fresh volume the owner of the folder that it covers, and to root what the image does not have."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    owned = set(re.findall(r"/(?:etc|var/lib)/finemesh[\w/]*(?=[\s\\])", dockerfile))
    for names, folder in re.findall(r"for \w+ in ([a-z ]+); do.*?0700 (\S+)/\$\w+;", dockerfile, re.DOTALL):
        owned |= {f"{folder}/{name}" for name in names.split()}
    for container in (COMPOSE["services"][name] for name in (CERTIFICATES, *(peer.name for peer in SERVICES))):
        assert {volume.split(":")[1] for volume in container["volumes"]} <= owned


@each_service
def test_artifacts_are_mounted_room_by_room(service: Service) -> None:
    """A service that is taken over reads and writes no room of the store but those that the table gives it."""
    mounted = sorted(volume for volume in described(service)["volumes"] if "artifacts" in volume)
    store = "/var/lib/finemesh/artifacts"
    wanted = [f"artifacts-{room}:{store}/{room}:ro" for room in service.reads]
    wanted += [f"artifacts-{room}:{store}/{room}" for room in service.writes]
    assert mounted == sorted(wanted)


def test_every_room_of_the_store_has_one_writer() -> None:
    writers = [room for service in SERVICES for room in service.writes]
    assert len(writers) == len(set(writers))
    assert {room for service in SERVICES for room in service.reads} <= set(writers)
    assert {f"artifacts-{room}" for room in writers} == {name for name in COMPOSE["volumes"] if "artifacts" in name}
    # A fresh volume takes over the owner of the folder that the image has there.
    made = re.search(r"for room in ([a-z ]+); do", (DEPLOY / "Dockerfile").read_text())
    assert made is not None
    assert made[1].split() == sorted(writers)


@each_service
def test_credentials_can_be_given_to_one_service_alone(service: Service) -> None:
    files = [entry["path"] for entry in described(service)["env_file"]]
    assert files == ["settings.env", f"settings.{service.name}.env"]
    assert all(not entry["required"] for entry in described(service)["env_file"])


def test_bucket_policies_follow_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bucket_policies.main(["s3://our-bucket/mesh/"]) == 0
    policies = json.loads(capsys.readouterr().out)
    assert set(policies) == {"gateway", "billing", "inference", "trainer"}
    allowed = {entry["Sid"]: entry for entry in policies["trainer"]["Statement"]}
    assert set(allowed) == {"List", "Read", "Write"}
    mesh = "arn:aws:s3:::our-bucket/mesh"
    assert allowed["Read"]["Resource"] == [f"{mesh}/base/*", f"{mesh}/files/*", f"{mesh}/jobs/*"]
    assert allowed["Write"]["Resource"] == [f"{mesh}/jobs/*"]
    assert "s3:DeleteObject" in allowed["Write"]["Action"]
    assert allowed["Read"]["Action"] == ["s3:GetObject"]
    assert bucket_policies.main(["s3://our-bucket"]) == 0
    policies = json.loads(capsys.readouterr().out)
    assert policies["billing"]["Statement"][-1]["Resource"] == ["arn:aws:s3:::our-bucket/archive/*"]
    with pytest.raises(SystemExit):
        bucket_policies.main(["file:///var/lib"])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_nothing_has_rights_that_it_does_not_need(name: str) -> None:
    container = COMPOSE["services"][name]
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["read_only"] is True
    assert "mem_limit" in container
    assert "pids_limit" in container
    assert "cap_add" not in container or name == POSTGRES
    assert "ports" not in container or name == "gateway"
    assert "privileged" not in container


def test_only_stateful_services_reach_the_database() -> None:
    assert COMPOSE["networks"]["data"] == {"internal": True}
    for service in SERVICES:
        assert ("data" in described(service)["networks"]) == bool(service.needs)


def test_database_roles_are_those_with_a_database() -> None:
    script = (DEPLOY / "postgres/roles.sh").read_text()
    roles = re.search(r"for role in ([a-z ]+);", script)
    assert roles is not None
    assert roles[1].split() == [service.name for service in SERVICES if service.database]
    passwords = {f"{service.env_prefix}DATABASE_PASSWORD" for service in SERVICES if service.database}
    assert passwords < set(COMPOSE["services"][POSTGRES]["environment"])


def test_bus_is_as_durable_as_the_launcher_makes_it() -> None:
    ours = (DEPLOY / "nats/finemesh.conf").read_text()
    passwords = dict.fromkeys(USERS, "secret")
    launched_conf = Broker(folder=Path("/data"), port=4222, passwords=passwords).configuration()
    for conf in (ours, launched_conf):
        assert "sync_interval: always" in conf
        assert "authorization {" in conf
        for listener in ("http", "https", "websocket", "mqtt", "leafnodes"):
            assert not re.search(rf"^\s*{listener}\b", conf, re.MULTILINE)


def test_each_service_is_its_own_user_of_the_bus() -> None:
    written = TARGET.read_text()
    assert users(lambda user: f"${password_variable(user)}") in written, "run `python -m deploy.bus_users`"
    assert "include ./users.conf" in (DEPLOY / "nats/finemesh.conf").read_text()
    assert {service.name for service in SERVICES if NATS in service.needs} == set(bus_users.SERVICES)
    told = {
        name: re.findall(r"[A-Z_]+_NATS_PASSWORD", str(container.get("environment")))
        for name, container in COMPOSE["services"].items()
    }
    assert set(told.pop(NATS)) == {password_variable(user) for user in USERS}
    assert {name: names for name, names in told.items() if names} == {
        name: [password_variable(name)] for name in bus_users.SERVICES
    }


def test_each_event_belongs_to_one_service() -> None:
    declared = {
        message.GetOptions().Extensions[event_options_pb2.subject]
        for contract in EVENTS
        for message in contract.DESCRIPTOR.message_types_by_name.values()
    } - {"", "usage.cluster.hour_recorded"}
    published = [subject for subjects in bus_users.PUBLISHED.values() for subject in subjects]
    assert set(published) == declared
    assert {subject for subject in published if published.count(subject) > 1} == {"deadletter.event_set_aside"}


def test_gpu_override_names_services_of_the_table() -> None:
    assert set(GPU["services"]) == {"trainer", "inference"}
    for name, container in GPU["services"].items():
        assert container["build"]["args"] == {"ACCELERATOR": "cuda"}
        assert container["image"] != COMPOSE["services"][name]["image"]
        (device,) = container["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def variables(text: str) -> dict[str, str]:
    """Name -> what follows it inside of the braces: `:-default`, `:?message` or nothing."""
    return {name: rest for name, rest in sorted(re.findall(r"\$\{([A-Z_]+)([^}]*)\}", text))}


def test_example_explains_every_variable() -> None:
    used = variables((DEPLOY / "compose.yaml").read_text()) | variables((DEPLOY / "compose.gpu.yaml").read_text())
    explained = re.findall(r"^#?([A-Z_]+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(used)


def test_secrets_are_required_and_have_no_value_in_any_file() -> None:
    required = {name for name, rest in variables((DEPLOY / "compose.yaml").read_text()).items() if ":?" in rest}
    empty = set(re.findall(r"^([A-Z_]+)=$", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert required == empty
    assert all(name.endswith(("PASSWORD", "TOKEN", "KEY")) for name in required)


def test_env_is_filled_once_and_kept() -> None:
    numbers = iter(range(100))
    example = "# Why.\nA_PASSWORD=\n#OPTION=1\nB_TOKEN=\n"
    text, made = compose_env.filled(example, "", lambda: f"s{next(numbers)}")
    assert (text, made) == ("# Why.\nA_PASSWORD=s0\n#OPTION=1\nB_TOKEN=s1\n", ["A_PASSWORD", "B_TOKEN"])
    assert compose_env.filled(example, text, lambda: "never") == (text, [])
    more, made = compose_env.filled(f"{example}C_TOKEN=\n", text, lambda: "new")
    assert (more, made) == (f"{text}C_TOKEN=new\n", ["C_TOKEN"])


def test_env_file_is_private(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    assert compose_env.main(["--out", str(target)]) == 0
    assert target.stat().st_mode & 0o077 == 0
    first = target.read_text()
    secrets = re.findall(r"^[A-Z_]+=([0-9a-f]{48})$", first, re.MULTILINE)
    assert len(secrets) == len(set(secrets)) == 14
    compose_env.main(["--out", str(target)])
    assert target.read_text() == first
