"""Starts the scheduler: a straight line of settings, database, bus, implementation, workers, server."""

import sys

from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import open_pool
from chassis.ids import SystemIds
from chassis.process import DrainStage, Process, run
from chassis.rpc.server import ServerBuilder
from finemesh.allocations.v1.allocation_service_pb2_grpc import add_AllocationServiceServicer_to_server
from finemesh.nodes.v1.node_service_pb2_grpc import add_NodeServiceServicer_to_server
from finemesh.tuning.v1.tuning_service_pb2_grpc import add_TuningServiceServicer_to_server
from services.scheduler.admission import Admission
from services.scheduler.allocation_service import AllocationService
from services.scheduler.analysis import Analyzer
from services.scheduler.attempts import Attempts
from services.scheduler.config import SchedulerSettings
from services.scheduler.follow import Follower
from services.scheduler.heartbeat import Heartbeats
from services.scheduler.job_secrets import JobSecrets
from services.scheduler.job_store import JobStore
from services.scheduler.limits import load_limits
from services.scheduler.node_service import NodeService
from services.scheduler.node_store import NodeStore
from services.scheduler.peers import Peers
from services.scheduler.pipelines.placement import Placer
from services.scheduler.pipelines.release import Releaser
from services.scheduler.pipelines.renewal import Renewer
from services.scheduler.pipelines.sweeper import Sweeper
from services.scheduler.pipelines.validate import Validator
from services.scheduler.preview import Previewer
from services.scheduler.requests import Requests
from services.scheduler.secret_box import SecretBox
from services.scheduler.store import MIGRATIONS, Store
from services.scheduler.template_facts import TemplateFacts
from services.scheduler.tuning_service import TuningService
from services.scheduler.view import JobView
from services.scheduler.watch import Hub, Listener


async def main(process: Process) -> None:
    settings = process.settings
    assert isinstance(settings, SchedulerSettings)
    clock, ids = SystemClock(), SystemIds()

    pool = await open_pool(settings)
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    await migrate(pool, [MIGRATIONS])
    bus = await connect(settings)
    process.on_drain(DrainStage.CLOSE_BUS, bus.close)
    outbox = Outbox(settings, clock=clock, ids=ids)
    peers = Peers(settings)
    process.on_drain(DrainStage.RELEASE_LEASES, peers.close)

    hub = Hub()
    store = Store(pool, outbox, clock)
    jobs, nodes = JobStore(store), NodeStore(store)
    attempts = Attempts(store, jobs, settings)
    limits = load_limits()
    admission = Admission(store, peers, limits, settings)
    analyzer = Analyzer(store, peers, settings)
    view = JobView(store, settings)
    job_secrets = JobSecrets(store, SecretBox(settings.secrets_key) if settings.secrets_key else None)
    requests = Requests(store, jobs, admission, job_secrets, ids)
    follower = Follower(store, view, hub, settings)
    heartbeats = Heartbeats(store, nodes, hub, settings)

    process.spawn("relay", Relay(pool, bus, outbox, clock=clock).run, until=DrainStage.RELEASE_LEASES)
    process.spawn("listener", Listener(pool, hub, clock).run, until=DrainStage.RELEASE_LEASES)
    validator = Validator(store, jobs, analyzer, peers, hub, clock, ids, settings)
    for number in range(settings.validations_concurrent_max):
        process.spawn(f"validator-{number}", validator.run)
    process.spawn("releaser", Releaser(store, peers, clock, ids, settings).run)
    process.spawn("renewer", Renewer(store, attempts, peers, clock, settings).run)
    process.spawn("placer", Placer(store, jobs, hub, clock, settings).run)
    process.spawn("sweeper", Sweeper(store, nodes, attempts, clock, settings).run)

    server = ServerBuilder(process, settings, trusted_forwarders={"gateway"})
    server.add(
        add_TuningServiceServicer_to_server,
        TuningService(
            store,
            admission,
            analyzer,
            peers,
            requests,
            view,
            follower,
            Previewer(store, peers, limits, settings),
            TemplateFacts(store, peers, clock, settings),
        ),
        "finemesh.tuning.v1.TuningService",
        allow={"gateway"},
        endless={"WatchTuningJob"},
    )
    server.add(
        add_NodeServiceServicer_to_server,
        NodeService(store, nodes, attempts, heartbeats, job_secrets, ids, settings),
        "finemesh.nodes.v1.NodeService",
        allow={"trainer"},
        endless={"Heartbeat"},
    )
    server.add(
        add_AllocationServiceServicer_to_server,
        AllocationService(store, settings),
        "finemesh.allocations.v1.AllocationService",
        allow={"inference"},
    )
    await server.start()


if __name__ == "__main__":
    sys.exit(run(main, SchedulerSettings()))
