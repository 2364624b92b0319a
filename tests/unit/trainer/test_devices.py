"""How a node's devices are named: from a driver that a test plays, and without one."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.node import devices

GIB = 1024**3


class NvmlError(Exception):
    pass


def fake_nvml(*gpus: tuple[str | bytes, int, str | bytes], driver: bool = True) -> Any:
    def init() -> None:
        if not driver:
            raise NvmlError("NVML Shared Library Not Found")

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: gpus[index],
        nvmlDeviceGetName=lambda gpu: gpu[0],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(total=gpu[1]),
        nvmlDeviceGetUUID=lambda gpu: gpu[2],
    )


@pytest.mark.parametrize(
    ("product_name", "memory_mib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "nvidia-h100-80gb"),
        ("NVIDIA H100 PCIe", 81559, "nvidia-h100-80gb"),
        ("NVIDIA H200", 143771, "nvidia-h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", 40536, "nvidia-a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "nvidia-a100-80gb"),
        ("NVIDIA L40S", 46068, "nvidia-l40s-48gb"),
        ("NVIDIA L4", 23034, "nvidia-l4-24gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "nvidia-rtx-4090-24gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "nvidia-rtx-6000-ada-generation-48gb"),
        ("Tesla V100-SXM2-16GB", 16384, "nvidia-v100-16gb"),
        ("NVIDIA GH200 480GB", 97871, "nvidia-gh200-96gb"),
        ("NVIDIA B200", 183359, "nvidia-b200-180gb"),
    ],
)
def test_a_product_name_and_a_measured_size_make_a_hardware_type(
    product_name: str, memory_mib: int, expected: str
) -> None:
    assert devices.hardware_type(product_name, memory_mib * 1024**2) == expected


def test_gpus_come_in_the_drivers_order_with_their_ids() -> None:
    found = devices.discover(fake_nvml(("NVIDIA L4", 24 * GIB, "GPU-a"), (b"NVIDIA H200", 141 * GIB, b"GPU-b")))
    assert [(device.index, device.hardware_type, device.uuid) for device in found] == [
        (0, "nvidia-l4-24gb", "GPU-a"),
        (1, "nvidia-h200-141gb", "GPU-b"),
    ]
    assert all(device.is_gpu for device in found)


@pytest.mark.parametrize("nvml", [fake_nvml(driver=False), fake_nvml()])
def test_a_machine_without_a_gpu_is_one_cpu_device(nvml: Any) -> None:
    (only,) = devices.discover(nvml)
    assert (only.index, only.hardware_type, only.uuid, only.is_gpu) == (0, "cpu", "", False)
    assert only.memory_bytes > GIB // 2


def test_a_machine_without_a_gpu_can_be_several_devices() -> None:
    (whole,) = devices.discover(fake_nvml())
    parts = devices.discover(fake_nvml(), cpu_devices=3)
    assert [(part.index, part.hardware_type) for part in parts] == [(0, "cpu"), (1, "cpu"), (2, "cpu")]
    assert {part.memory_bytes for part in parts} == {whole.memory_bytes // 3}
    assert len(devices.discover(fake_nvml(("NVIDIA L4", 24 * GIB, "GPU-a")), cpu_devices=3)) == 1


def test_a_containers_limit_is_its_memory(tmp_path: Any) -> None:
    limit, unlimited = tmp_path / "memory.max", tmp_path / "other"
    limit.write_text("1073741824\n")
    unlimited.write_text("max\n")
    assert devices._machine_memory_bytes((limit, unlimited, tmp_path / "missing")) == GIB
    assert devices._machine_memory_bytes((unlimited,)) > GIB // 2
