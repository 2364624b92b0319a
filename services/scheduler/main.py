"""Starts the scheduler: a straight line of settings, database, bus, implementation, workers, server."""

import functools
import sys
from collections.abc import Callable

from google.protobuf.message import Message

from chassis.bus.connection import connect
from chassis.bus.consumer import Consumer, Handler
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import Clock, SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.ids import SystemIds
from chassis.paging import Pages
from chassis.process import DrainStage, Process, run
from chassis.retention import RetentionKeeper
from chassis.rounds import spawn_keeper
from chassis.rpc.server import ServerBuilder
from finemesh.allocations.v1.allocation_service_pb2_grpc import add_AllocationServiceServicer_to_server
from finemesh.artifacts.v1.file_use_service_pb2_grpc import add_FileUseServiceServicer_to_server
from finemesh.events.v1 import model_events_pb2
from finemesh.nodes.v1.node_service_pb2_grpc import add_NodeServiceServicer_to_server
from finemesh.tuning.v1.tuning_service_pb2_grpc import add_TuningServiceServicer_to_server
from services.scheduler.admission.admission import Admission
from services.scheduler.admission.dataset_counts import Analyzer
from services.scheduler.admission.dataset_preview import Previewer
from services.scheduler.admission.job_requests import JobRequests
from services.scheduler.admission.quotes_in_line import QuotesInLine
from services.scheduler.admission.template_facts import TemplateFacts
from services.scheduler.api.allocation_service import AllocationService
from services.scheduler.api.file_use_service import FileUseService
from services.scheduler.api.job_feed import JobFeeds, JobReader
from services.scheduler.api.job_view import JobView
from services.scheduler.api.job_watch import Follower
from services.scheduler.api.node_service import NodeService
from services.scheduler.api.queue_snapshot import QueueSnapshots
from services.scheduler.api.tuning_service import TuningService
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.reports import AttemptReports
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import MIGRATIONS, Database
from services.scheduler.folders.deleted_models import DeletedModels
from services.scheduler.folders.job_folders import JobFolders
from services.scheduler.jobs.job_secrets import JobSecrets
from services.scheduler.jobs.secret_box import SecretBox
from services.scheduler.jobs.transitions import JobTransitions
from services.scheduler.nodes.heartbeats import Heartbeats
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.peers import Peers
from services.scheduler.pipelines.history_keeper import HistoryKeeper
from services.scheduler.pipelines.hold_releaser import Releaser
from services.scheduler.pipelines.hold_renewer import Renewer
from services.scheduler.pipelines.lease_sweeper import Sweeper
from services.scheduler.pipelines.placer import Placer
from services.scheduler.pipelines.validator import Validator
from services.scheduler.placement.lease_holders import LeaseHolders
from services.scheduler.placement.serving import ServingAllocations
from services.scheduler.retention_rules import retention_rules
from services.scheduler.spec.tuning_limits import load_limits
from services.scheduler.watching.hub import Hub
from services.scheduler.watching.listener import Listener
from services.scheduler.watching.store import notify


async def main(process: Process, settings: SchedulerSettings) -> None:
    clock, ids = SystemClock(), SystemIds()
    pool, agents_pool = await open_pools(process, settings)
    await migrate(pool, [MIGRATIONS])
    bus = await connect(settings)
    process.on_drain(DrainStage.CLOSE_BUS, bus.close)
    outbox = Outbox(settings, clock=clock, ids=ids)
    peers = Peers(settings)
    process.on_drain(DrainStage.RELEASE_LEASES, peers.close)

    hub, limits = Hub(), load_limits()
    database = Database(pool, outbox, clock, hub.notify, notify)
    agents_database = Database(agents_pool, outbox, clock, hub.notify, notify)
    jobs, quotes = JobTransitions(database), QuotesInLine(database, clock, settings)
    box = SecretBox(settings.secrets_key) if settings.secrets_key else None
    attempts, reports = Attempts(agents_database, jobs, settings), AttemptReports(agents_database, jobs, settings)
    nodes = NodeRegistry(agents_database, attempts, nodes_max=settings.nodes_max)
    heartbeats = Heartbeats(agents_database, nodes, hub, settings)
    admission = Admission(database, peers, limits, settings)
    analyzer = Analyzer(database, peers, quotes, settings)
    requests = JobRequests(database, jobs, admission, JobSecrets(database, box), ids)
    previewer = Previewer(database, peers, limits, quotes, settings)
    templates = TemplateFacts(database, peers, clock, settings)
    folders, holders = JobFolders(agents_database, ids, settings), LeaseHolders(agents_database)
    view = JobView(database, QueueSnapshots(database, clock, settings))
    reader = JobReader(database, view, settings)
    feeds = JobFeeds(reader, hub, clock, settings)
    follower, pages = Follower(feeds, reader, settings), Pages(settings.page_token_key)

    keep = functools.partial(spawn_keeper, process, clock)
    keep("relay", Relay(pool, bus, outbox, clock=clock).run, until=DrainStage.RELEASE_LEASES)
    keep("listener", Listener(agents_pool, hub, clock).run, until=DrainStage.RELEASE_LEASES)
    keep("validator", Validator(database, jobs, analyzer, peers, hub, clock, ids, settings).run)
    keep("releaser", Releaser(database, peers, clock, ids, settings).run)
    keep("renewer", Renewer(database, attempts, peers, clock, settings).run)
    keep("job_feeds", feeds.run)
    keep("quote_places", quotes.run, until=DrainStage.RELEASE_LEASES)
    keep("placer", Placer(agents_database, jobs, hub, clock, settings).run)
    hear(process, keep, Consumer(pool, bus, "scheduler", handlers(folders), clock=clock, outbox=outbox))
    keep("sweeper", Sweeper(agents_database, nodes, attempts, clock, settings).run)
    spawn_deleters(keep, database, clock, settings)

    agents = agents_server(process, settings)
    agents.add(
        add_NodeServiceServicer_to_server,
        NodeService(
            nodes, heartbeats, reports, attempts, JobSecrets(agents_database, box), holders, folders, ids, settings
        ),
        "finemesh.nodes.v1.NodeService",
        allow={"trainer"},
        endless={"Heartbeat"},
    )
    agents.add(
        add_AllocationServiceServicer_to_server,
        AllocationService(ServingAllocations(agents_database, settings), holders, settings),
        "finemesh.allocations.v1.AllocationService",
        allow={"inference"},
    )
    server = gateways_server(process, pool, settings)
    bus.report_to(server.component)
    server.add(
        add_TuningServiceServicer_to_server,
        TuningService(database, admission, analyzer, peers, requests, view, follower, previewer, templates, pages),
        "finemesh.tuning.v1.TuningService",
        allow={"gateway"},
        endless={"WatchTuningJob"},
    )
    await agents.start()
    # Last: whoever asks this door whether the scheduler is healthy learns that agents are served, too.
    await server.start()


def handlers(folders: JobFolders) -> dict[type[Message], Handler]:
    """What this service hears of others."""
    return {model_events_pb2.ModelDeleted: DeletedModels(folders).model_deleted}


def hear(process: Process, keep: Callable[..., None], consumer: Consumer) -> None:
    keep("consumer", consumer.run)
    process.on_drain(DrainStage.STOP_CONSUMING, consumer.stop)


def gateways_server(process: Process, pool: Pool, settings: SchedulerSettings) -> ServerBuilder:
    """The door of the gateway, with what it asks for itself."""
    server = ServerBuilder(process, settings, trusted_forwarders={"gateway"})
    name = "finemesh.artifacts.v1.FileUseService"
    server.add(add_FileUseServiceServicer_to_server, FileUseService(pool), name, allow={"gateway"})
    return server


def agents_server(process: Process, settings: SchedulerSettings) -> ServerBuilder:
    """The door of agents and of inference, apart from that of users."""
    address, port_file = settings.agents_address, settings.agents_port_file
    return ServerBuilder(process, settings, listen_address=address, port_file=port_file)


def spawn_deleters(keep: Callable[..., None], database: Database, clock: Clock, settings: SchedulerSettings) -> None:
    """What deletes that is past keeping."""
    keep("history_keeper", HistoryKeeper(database, clock, settings).run)
    rules = retention_rules(settings)
    keep("retention_keeper", RetentionKeeper(database.pool, rules, settings, clock=clock).run)


async def open_pools(process: Process, settings: SchedulerSettings) -> tuple[Pool, Pool]:
    """One for users, and one for what keeps leases, which never waits in line with them."""
    pool = await open_pool(settings)
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    agents_pool = await open_pool(settings.model_copy(update={"pool_size_max": settings.agents_pool_size_max}))
    process.on_drain(DrainStage.CLOSE_POOL, agents_pool.close)
    return pool, agents_pool


def start() -> int:
    settings = SchedulerSettings()
    return run(lambda process: main(process, settings), settings)


if __name__ == "__main__":
    sys.exit(start())
