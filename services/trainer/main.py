"""The trainer's agent as a daemon: `python -m services.trainer.main`. Wiring in one straight line, without torch."""

import sys

from chassis.clock import SystemClock
from chassis.ids import SystemIds
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from chassis.objects.transfer import FileTransfer
from chassis.process import DrainStage, Process, run
from chassis.rpc.server import ServerBuilder
from finemesh.datasets.v1 import dataset_service_pb2_grpc
from services.trainer.agent.agent import Agent
from services.trainer.agent.job_folders import JobFolders
from services.trainer.agent.scheduler_link import SchedulerLink
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.attempt.kit import Kit
from services.trainer.child.warm_children import WarmChildren
from services.trainer.config import TrainerSettings
from services.trainer.datasets.dataset_service import FULL_NAME, DatasetService
from services.trainer.node import devices
from services.trainer.node.work_folders import NodeFolder


async def main(process: Process, settings: TrainerSettings) -> None:
    clock, ids = SystemClock(), SystemIds()
    node_folder = NodeFolder(settings.attempts_root, settings.node_name).open()
    objects = ObjectStore(
        settings.artifacts_url,
        part_bytes=max(settings.transfer_chunk_bytes, PART_BYTES_MIN),
        parts_in_flight_max=2,
    )
    store = FileTransfer(
        objects,
        clock,
        chunk_bytes=settings.transfer_chunk_bytes,
        concurrent_max=settings.transfers_concurrent_max,
        attempts_max=settings.transfer_attempts_max,
    )
    cache = FileCache(
        settings.cache_root,
        store,
        size_bytes_max=settings.cache_size_bytes_max,
        concurrent_max=settings.transfers_concurrent_max,
    )

    datasets = DatasetService(cache, node_folder, settings, ids)
    server = ServerBuilder(process, settings, serving=False, trusted_forwarders={"scheduler"})
    server.add(dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server, datasets, FULL_NAME, allow={"scheduler"})
    await server.start()

    link = SchedulerLink(settings)
    local_devices = {device.index: device for device in devices.discover(cpu_devices=settings.cpu_devices)}
    kit = Kit(
        settings=settings,
        stub=link.stub,
        store=store,
        cache=cache,
        node_folder=node_folder,
        devices=local_devices,
        warm=WarmChildren(settings, local_devices),
        clock=clock,
    )
    folders = JobFolders(link.stub, objects, settings, clock)

    async def on_registered() -> None:
        # Healthy once the scheduler knows the node: before, a job that only it could run is refused as too large.
        await server.set_serving(serving=True)
        folders.begin()

    agent = Agent(
        kit,
        link,
        incarnation=ids.uuid().hex,
        address=server.address,
        on_registered=on_registered,
    )
    process.spawn("agent", agent.run)
    process.spawn("job_folders", folders.run)

    # The children die in the first moments of a drain: steps that they did meanwhile would be metered in other ranges
    # than those of the next attempt. Their endings are reported until the grace is over.
    process.on_drain(DrainStage.NOT_SERVING, agent.stop_working)
    process.on_drain(DrainStage.RELEASE_LEASES, agent.release)
    process.on_drain(DrainStage.RELEASE_LEASES, datasets.drain)
    process.on_drain(DrainStage.CLOSE_POOL, link.close)


def start() -> int:
    settings = TrainerSettings()
    return run(lambda process: main(process, settings), settings)


if __name__ == "__main__":
    sys.exit(start())
