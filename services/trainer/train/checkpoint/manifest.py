"""The names of the files in a checkpoint, and the machine that its sums depend on.

It reads and writes nothing.
"""

from typing import Any

import torch

from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group
from services.trainer.train.settings.spec import Spec

VERSION = 1
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"
STATE = "state.json"
SHARDS = "shards"
FOLDER_NAME = "step-{:08d}"


def machine_of(spec: Spec, group: Group, model: CausalModel) -> dict[str, Any]:
    """The parts of the machine that decide the last bits of the sums."""
    machine = {
        "device": spec.device.split(":")[0],
        "threads": spec.threads,
        "processes": group.size,
        "torch": str(torch.__version__),
    }
    return machine | ({"kernels": list(model.kernels)} if model.kernels else {})
