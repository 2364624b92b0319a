"""Which program of this node scores an export before a job succeeds.

It starts nothing, and knows the engine by its name only.
"""

import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from services.trainer.config import TrainerSettings
from services.trainer.node.devices import LocalDevice

AUTO = "auto"
ENGINE_LIBRARY = "vllm"
# By name: services import one another nowhere, and it runs as a process of its own.
ENGINE_PROGRAM = "services.inference.engines.score"


def scorer_of(
    settings: TrainerSettings, device: LocalDevice, find: Callable[[str], Any] = find_spec
) -> tuple[str, ...]:
    """The words of its command line; empty: transformers and peft alone.

    On a CPU a start of the engine takes longer than most jobs that train there, so `auto` leaves it out.
    """
    if settings.parity_command != AUTO:
        return tuple(shlex.split(settings.parity_command))
    if not device.is_gpu or find(ENGINE_LIBRARY) is None:
        return ()
    return (sys.executable, "-m", ENGINE_PROGRAM)
