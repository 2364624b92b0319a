"""Which program scores an export on this node: the operator's word first,
the serving engine where it is quick to start, or none."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from services.trainer.config import TrainerSettings
from services.trainer.inputs.parity_program import scorer_of
from services.trainer.node.devices import LocalDevice

GPU = LocalDevice(index=0, hardware_type="nvidia-h100-80gb", memory_bytes=80 << 30, uuid="GPU-1")
CPU = LocalDevice(index=0, hardware_type="cpu", memory_bytes=8 << 30)


def installed(*names: str) -> Callable[[str], Any]:
    return lambda name: object() if name in names else None


@pytest.mark.parametrize(
    ("given", "device", "libraries", "expected"),
    [
        ({}, GPU, ("vllm",), (sys.executable, "-m", "services.inference.engines.score")),
        ({}, GPU, (), ()),
        ({}, CPU, ("vllm",), ()),
        ({"parity_command": ""}, GPU, ("vllm",), ()),
        ({"parity_command": "score --threads '2 3'"}, CPU, (), ("score", "--threads", "2 3")),
    ],
    ids=["gpu-with-engine", "gpu-without-engine", "cpu", "switched-off", "the-operators"],
)
def test_the_program_of_a_node(
    given: dict[str, Any], device: LocalDevice, libraries: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    settings = TrainerSettings.model_construct(**({"parity_command": "auto"} | given))
    assert scorer_of(settings, device, find=installed(*libraries)) == expected


def test_auto_is_the_default() -> None:
    assert TrainerSettings.model_fields["parity_command"].default == "auto"
