"""Not pure: gRPC. The other services as the scheduler calls them: channels and stubs, opened once.

It knows addresses, not meanings.
"""

import asyncio
import contextvars
from collections import OrderedDict
from typing import TypeAlias

import grpc

from chassis.rpc.channel import open_channel
from finemesh.artifacts.v1 import file_artifact_service_pb2_grpc, model_artifact_service_pb2_grpc
from finemesh.datasets.v1 import dataset_service_pb2_grpc
from finemesh.holds.v1 import hold_service_pb2_grpc
from services.scheduler.config import SchedulerSettings

TRAINER = "trainer"
# The generated name of the stub is known to type checkers only.
DatasetStub: TypeAlias = "dataset_service_pb2_grpc.DatasetServiceAsyncStub"


class Peers:
    """Channels connect at the first call, so start order does not matter."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        gateway = open_channel(settings, settings.gateway_address, "gateway")
        billing = open_channel(settings, settings.billing_address, "billing")
        inference = open_channel(settings, settings.inference_address, "inference")
        self._channels = [gateway, billing, inference]
        self._trainers: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self.files = file_artifact_service_pb2_grpc.FileArtifactServiceStub(gateway)
        self.models = model_artifact_service_pb2_grpc.ModelArtifactServiceStub(inference)
        self.holds = hold_service_pb2_grpc.HoldServiceStub(billing)

    def datasets(self, address: str) -> DatasetStub:
        """The analysis of the trainer at `address`; the channels used last stay open."""
        channel = self._trainers.get(address) or open_channel(self._settings, address, TRAINER)
        self._trainers[address] = channel
        self._trainers.move_to_end(address)
        return dataset_service_pb2_grpc.DatasetServiceStub(channel)

    def prune(self) -> None:
        """Closes the trainers' channels that were not used for longest, once the calls on them are over. Nobody waits
        for that."""
        while len(self._trainers) > self._settings.analyzers_max:
            _, channel = self._trainers.popitem(last=False)
            closing = channel.close(grace=self._settings.analysis_deadline_s)
            task = asyncio.get_running_loop().create_task(closing, context=contextvars.Context())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for task in self._closing:
            task.cancel()
        for channel in [*self._channels, *self._trainers.values()]:
            await channel.close()
