"""What each process is told through its environment. Pure: facts in, variables out;
the services' settings read them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.ports import HOST
from deploy.local.table import NATS, Service

# The bus sets a stream's full size aside when it makes the stream, and refuses what the disk does not have.
STREAM_SIZE_BYTES_MAX = 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known before the first service starts. `ports` is keyed by process, and by `<service>.<DOOR>`;
    `secrets` by variable; the urls by service, each with credentials of its own."""

    ports: Mapping[str, int]
    database_urls: Mapping[str, str]
    secrets: Mapping[str, str]
    nats_urls: Mapping[str, str]
    tls_dir: Path
    artifacts_dir: Path
    data_dir: Path
    engine: str | None
    log_format: str


def address(facts: Facts, key: str) -> str:
    return f"{HOST}:{facts.ports[key]}"


def addresses(facts: Facts, service: Service, door: str = "") -> str:
    """Of all replicas of a service, with commas between; of the first node alone where each process is another node."""
    numbers = range(1) if service.per_node else itertools.count()
    keys = itertools.takewhile(facts.ports.__contains__, (f"{process_name(service, each)}{door}" for each in numbers))
    return ",".join(address(facts, key) for key in keys)


def process_name(service: Service, number: int) -> str:
    """`trainer-0` of the first node; `billing` of the first replica and `billing-1` of the second."""
    return f"{service.name}-{number}" if service.per_node or number else service.name


def node_name(number: int) -> str:
    return f"local-{number}"


def certificate_name(service: Service, number: int) -> str:
    """As the authority knows it: each node has its own."""
    return f"{service.name}@{node_name(number)}" if service.per_node else service.name


def listeners(service: Service, number: int) -> list[str]:
    """The port keys of one process: its mesh server and its doors."""
    name = process_name(service, number)
    return [name, *(f"{name}.{door}" for door in (*service.doors, *service.mesh_doors))]


def environment_of(service: Service, node: int, services: tuple[Service, ...], facts: Facts) -> dict[str, str]:
    """Shared variables, everybody's addresses, and the process's own."""
    environment = {
        "FINEMESH_TLS_DIR": str(facts.tls_dir),
        "FINEMESH_ARTIFACTS_URL": facts.artifacts_dir.as_uri(),
        "FINEMESH_DATA_DIR": str(facts.data_dir),
        "FINEMESH_LOG_FORMAT": facts.log_format,
        "PYTHONUNBUFFERED": "1",
        f"{service.env_prefix}LISTEN_ADDRESS": address(facts, process_name(service, node)),
    }
    for peer in services:
        environment[f"{peer.env_prefix}ADDRESS"] = addresses(facts, peer)
        for door in peer.mesh_doors:
            environment[f"{peer.env_prefix}{door}_ADDRESS"] = addresses(facts, peer, f".{door}")
    for door in (*service.doors, *service.mesh_doors):
        environment[f"{service.env_prefix}{door}_ADDRESS"] = address(facts, f"{process_name(service, node)}.{door}")
    if NATS in service.needs:
        environment["FINEMESH_NATS_URL"] = facts.nats_urls[service.name]
        environment["FINEMESH_STREAM_SIZE_BYTES_MAX"] = str(STREAM_SIZE_BYTES_MAX)
    if service.database:
        environment[f"{service.env_prefix}DATABASE_URL"] = facts.database_urls[service.name]
    environment |= {name: facts.secrets[name] for name in service.secret_variables}
    if service.per_node or service.on_first_node:
        environment[f"{service.env_prefix}NODE_NAME"] = node_name(node)
    if service.per_node:
        environment["FINEMESH_TLS_DIR"] = str(facts.tls_dir / certificate_name(service, node))
        environment[f"{service.env_prefix}WORK_DIR"] = str(facts.data_dir / "work" / process_name(service, node))
    if facts.engine is not None:
        environment["FINEMESH_INFERENCE_ENGINE"] = facts.engine
    return environment
