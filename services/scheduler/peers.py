"""Not pure: gRPC. The other services as the scheduler calls them: channels and stubs, opened once.

It knows addresses, not meanings.
"""

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
        self.files = file_artifact_service_pb2_grpc.FileArtifactServiceStub(gateway)
        self.models = model_artifact_service_pb2_grpc.ModelArtifactServiceStub(inference)
        self.holds = hold_service_pb2_grpc.HoldServiceStub(billing)

    def datasets(self, address: str) -> DatasetStub:
        """The analysis of the trainer at `address`; the channels used last stay open."""
        channel = self._trainers.get(address) or open_channel(self._settings, address, TRAINER)
        self._trainers[address] = channel
        self._trainers.move_to_end(address)
        return dataset_service_pb2_grpc.DatasetServiceStub(channel)

    async def prune(self) -> None:
        """Closes the trainers' channels that were not used for longest."""
        while len(self._trainers) > self._settings.analyzers_max:
            _, channel = self._trainers.popitem(last=False)
            await channel.close(grace=self._settings.analysis_deadline_s)

    async def close(self) -> None:
        for channel in [*self._channels, *self._trainers.values()]:
            await channel.close()
