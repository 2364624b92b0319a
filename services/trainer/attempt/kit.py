"""What every attempt of this agent works with. Not pure: gRPC."""

from collections.abc import Mapping
from dataclasses import dataclass

from chassis.clock import Clock
from chassis.objects.transfer import FileTransfer
from finemesh.nodes.v1 import node_service_pb2_grpc
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.child.warm_children import WarmChildren
from services.trainer.config import TrainerSettings
from services.trainer.node.devices import LocalDevice
from services.trainer.node.work_folders import NodeFolder


@dataclass(frozen=True, kw_only=True)
class Kit:
    settings: TrainerSettings
    stub: "node_service_pb2_grpc.NodeServiceAsyncStub"
    store: FileTransfer
    cache: FileCache
    node_folder: NodeFolder
    devices: Mapping[int, LocalDevice]
    warm: WarmChildren
    clock: Clock
