"""Seconds and memory of the timed steps on a device whose work goes on behind the host's back. It knows no trainer."""

from __future__ import annotations

import time

import torch

from bench.train.run_clock import peak_bytes


class DeviceClock:
    def __init__(self, device: str) -> None:
        self._is_cuda = device.startswith("cuda")
        self._began_s = 0.0
        self.seconds = 0.0

    def start(self) -> None:
        self._wait()
        self._began_s = time.perf_counter()

    def finish(self) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._began_s

    def peak_bytes(self) -> int:
        """Of the device, where there is one."""
        return torch.cuda.max_memory_allocated() if self._is_cuda else peak_bytes()

    def _wait(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
