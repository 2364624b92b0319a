"""The one table of what the mesh consists of: what starts, after what, and what it is given.

Compose is compared with it. It knows names and modules, never how a process is started.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

POSTGRES = "postgres"
NATS = "nats"
# Of each service that has lists; its replicas share it.
PAGE_TOKEN_KEY = "PAGE_TOKEN_KEY"  # noqa: S105  # the name of a variable


@dataclass(frozen=True, kw_only=True)
class Service:
    """One line of the table.

    `needs` are healthy before this one starts, and end after it. `reports_to` need not be there when this one starts,
    but end after it, too, so that it can hand back what it works on. `doors` are listeners besides the mesh server, by
    the suffix of the variable that names their address: `PUBLIC` -> `FINEMESH_GATEWAY_PUBLIC_ADDRESS`. `mesh_doors` are
    such listeners for other services, which are told of them, and not for the world. `bootstrap` is a module that runs
    once, after the first healthy start, and prints one line of JSON that is kept. `secrets` are random texts that only
    this service is told, by the suffix of their variable. `per_node` is one process for each node, `on_first_node` one
    that works on the devices of the first; both are told the node's name. `reads` and `writes` are the rooms of the
    artifact store that it works in, by the first part of their keys; who writes in one also reads it.
    """

    name: str
    module: str
    needs: tuple[str, ...]
    reports_to: tuple[str, ...] = ()
    database: bool = True
    doors: tuple[str, ...] = ()
    mesh_doors: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    bootstrap: str | None = None
    per_node: bool = False
    on_first_node: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def env_prefix(self) -> str:
        return f"FINEMESH_{self.name.upper()}_"

    @property
    def secret_variables(self) -> list[str]:
        return [f"{self.env_prefix}{name}" for name in self.secrets]


SERVICES: tuple[Service, ...] = (
    Service(
        name="gateway",
        module="services.gateway.main",
        needs=(POSTGRES,),
        doors=("PUBLIC", "HTTP"),
        secrets=(PAGE_TOKEN_KEY,),
        bootstrap="services.gateway.bootstrap",
        writes=("files",),
    ),
    Service(
        name="scheduler",
        module="services.scheduler.main",
        needs=(POSTGRES, NATS),
        mesh_doors=("AGENTS",),
        secrets=("SECRETS_KEY", PAGE_TOKEN_KEY),
    ),
    Service(
        name="billing",
        module="services.billing.main",
        needs=(POSTGRES, NATS),
        secrets=(PAGE_TOKEN_KEY,),
        writes=("archive",),
    ),
    # It gives its devices back when it stops.
    Service(
        name="inference",
        module="services.inference.main",
        needs=(POSTGRES, NATS),
        reports_to=("scheduler",),
        secrets=(PAGE_TOKEN_KEY,),
        on_first_node=True,
        reads=("jobs",),
        writes=("base",),
    ),
    # The agent keeps nothing and comes back to its scheduler by itself, so nothing has to be there first.
    Service(
        name="trainer",
        module="services.trainer.main",
        needs=(),
        reports_to=("scheduler",),
        database=False,
        per_node=True,
        reads=("base", "files"),
        writes=("jobs",),
    ),
)


def start_order(services: Sequence[Service]) -> list[str]:
    """Names of infrastructure and services, each after what it needs; graphlib.CycleError names a circle."""
    graph: dict[str, tuple[str, ...]] = {POSTGRES: (), NATS: ()}
    graph.update({service.name: service.needs for service in services})
    return list(TopologicalSorter(graph).static_order())
