"""The machine that the last bits of a run's sums depend on, as a checkpoint names it, and how two of them differ.

It reads and writes no file.
"""

import platform
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group
from services.trainer.train.settings.spec import Spec

_UNKNOWN = "unknown"


def machine_of(spec: Spec, group: Group, model: CausalModel) -> dict[str, Any]:
    """The parts of the machine that decide the last bits of the sums. All processes call it together; `hardware` is
    this process's, and `hardware_of_all` changes when any process's does."""
    device = spec.device.split(":")[0]
    hardware = hardware_of(spec.device)
    machine = {
        "device": device,
        "hardware": hardware,
        "threads": spec.threads,
        "processes": group.size,
        # With the kind of build (+cpu, +cu128), which the metadata of the package may leave out.
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    if group.size > 1:
        (total,) = group.total([float(zlib.crc32(hardware.encode()))])
        machine["hardware_of_all"] = f"{total:.0f}"
    return machine | ({"kernels": list(model.kernels)} if model.kernels else {})


def hardware_of(device: str) -> str:
    """The model of the GPU; of a CPU the widest instructions that torch's kernels use there, because sums are cut into
    their width."""
    if device == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same, each in words; empty when sums come out equal to the last bit. What a checkpoint does not
    name may be anything."""
    told = {
        name: f"{name} {_shown(before, name)} instead of {_shown(now, name)}"
        for name in sorted({*before, *now} - {"hardware_of_all"})
        if before.get(name) != now.get(name)
    }
    peers = before.get("hardware_of_all"), now.get("hardware_of_all")
    if not told and peers[0] != peers[1]:
        return ["other processes of the run were on other hardware"]
    return list(told.values())


def _shown(machine: Mapping[str, Any], name: str) -> str:
    value = machine.get(name)
    if name == "kernels":
        return "+".join(value) if value else "none"
    return _UNKNOWN if value is None else str(value)
