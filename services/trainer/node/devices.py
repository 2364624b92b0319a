"""Finds the devices of this node: NVIDIA GPUs, or `cpu` devices where there is none. Not pure: NVML, files.

It knows names and sizes; what a device costs or runs is nobody's business here.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pynvml
import structlog

log = structlog.get_logger()

CPU = "cpu"
GIB = 1024**3
# The sizes that cards are sold with. NVML tells what the driver leaves of them: 79.6 for 80, 44.9 for 48.
_SOLD_SIZES_GB = (2, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 94, 96, 128, 141, 180, 192, 288)
# Words of a product name that say how a card is built or branded, not what it is.
_FORM_FACTORS = frozenset(
    {"nvidia", "tesla", "geforce", "pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"}
)
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class LocalDevice:
    """`uuid` is the vendor's, empty for `cpu`."""

    index: int
    hardware_type: str
    memory_bytes: int
    uuid: str = ""

    @property
    def is_gpu(self) -> bool:
        return self.hardware_type != CPU


def discover(nvml: ModuleType = pynvml, *, cpu_devices: int = 1) -> list[LocalDevice]:
    """Every GPU that the driver shows, in its order; without any, the machine itself as `cpu_devices` equal parts."""
    found = _gpus(nvml)
    if found:
        return found
    share_bytes = _machine_memory_bytes() // cpu_devices
    return [LocalDevice(index=index, hardware_type=CPU, memory_bytes=share_bytes) for index in range(cpu_devices)]


def hardware_type(product_name: str, memory_bytes: int) -> str:
    """`NVIDIA H100 80GB HBM3` with 79.6 GiB gives `nvidia-h100-80gb`.

    The size is always the measured one: the 480GB in `GH200 480GB` are not the GPU's.
    """
    words = re.split(r"[^a-z0-9]+", product_name.lower())
    kept = [word for word in words if word and word not in _FORM_FACTORS and not re.fullmatch(r"\d+gb", word)]
    measured_gb = memory_bytes / GIB
    sold_gb = min(_SOLD_SIZES_GB, key=lambda size: abs(size - measured_gb))
    return "-".join(["nvidia", *(kept or ["gpu"]), f"{sold_gb}gb"])


def _gpus(nvml: ModuleType) -> list[LocalDevice]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.info("no_nvidia_driver", detail=str(error))
        return []
    try:
        return [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ModuleType, index: int) -> LocalDevice:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return LocalDevice(
        index=index,
        hardware_type=hardware_type(_text(nvml.nvmlDeviceGetName(handle)), memory_bytes),
        memory_bytes=memory_bytes,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
    )


def _text(value: str | bytes) -> str:
    # Older bindings give bytes.
    return value.decode() if isinstance(value, bytes) else value


def _machine_memory_bytes(limit_files: Sequence[Path] = _CGROUP_LIMITS) -> int:
    """The machine's memory, or what its container may use of it."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in limit_files:
        if path.is_file():
            limit = path.read_text().strip()
            if limit.isdigit() and int(limit) > 0:
                memory_bytes = min(memory_bytes, int(limit))
    return memory_bytes
