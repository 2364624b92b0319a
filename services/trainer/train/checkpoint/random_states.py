"""The states of torch's random generators: the CPU's and those of every CUDA device. It knows no file and no step."""

from collections.abc import Mapping
from typing import Any

import torch


def torch_states() -> dict[str, Any]:
    """The states by the name of their generator."""
    states = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"torch_cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_torch_states(states: Mapping[str, Any]) -> None:
    """Sets the states of those generators that this machine has."""
    torch.set_rng_state(states["torch_cpu"])
    for index in range(torch.cuda.device_count()):
        if f"torch_cuda_{index}" in states:
            torch.cuda.set_rng_state(states[f"torch_cuda_{index}"], index)
