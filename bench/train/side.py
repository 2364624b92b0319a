"""Talks to one side's worker process: a task in, its result out. It knows no trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.train.shapes import THREADS

BUILD = Path("build")


class Side:
    def __init__(self, name: str) -> None:
        self.name = name
        # Workers that sleep when idle: spinning ones would take the cores from whoever is measured next.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": ":".join(path for path in sys.path if path),
        }
        BUILD.mkdir(exist_ok=True)
        self._log = (BUILD / f"bench-train-{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.train.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError with what the side said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        result: dict[str, Any] = json.loads(line) if line else {"error": "the worker is gone"}
        if "error" in result:
            raise RuntimeError(f"{self.name}: {result['error']}")
        return result

    def close(self) -> None:
        """Ends the worker, which ends with its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
