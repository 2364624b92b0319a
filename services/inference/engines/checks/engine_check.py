"""Whether vLLM, as it is installed here, can load a model's architecture. Not pure: it starts a process of vLLM's own.

An architecture may need a library that this installation lacks (Qwen 3.5 needs torchvision, which the CPU build comes
without). The engine would not start, after the tuning was paid for. It runs in the service, where vLLM is imported
already; of the model it reads a name.
"""

from __future__ import annotations

import json
from pathlib import Path

from vllm.model_executor.models.registry import ModelRegistry

from services.inference.engines.checks.finding import Finding

_FILE = "config.json"


def check_engine_takes(folder: Path) -> None:
    """Raises Finding for an architecture whose module of vLLM lacks something here.

    What vLLM has no module for is served by its backend for transformers' models, and not looked at. The first look at
    an architecture takes seconds; vLLM keeps what it found.
    """
    for architecture in json.loads((folder / _FILE).read_bytes()).get("architectures") or ():
        model = ModelRegistry.models.get(architecture)
        if model is None:
            continue
        try:
            model.inspect_model_cls()
        except (ImportError, RuntimeError) as error:
            # What the process of vLLM printed; its last line is the error.
            lacking = str(error).strip().splitlines()[-1]
            if "ModuleNotFoundError" in lacking or "ImportError" in lacking:
                problem = f"{architecture} cannot be served here: vLLM needs what is not installed ({lacking})"
                raise Finding(_FILE, problem) from None
