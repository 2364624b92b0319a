"""Opens an engine by the name that its operator configured. Not pure: os.

Nothing else imports an engine, because the libraries of one take seconds to import. It refuses to know what the engines
have in common beyond their constructor.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from pathlib import Path
from typing import cast

from services.inference.engines.base import Engine, EngineFailed, EngineSettings

_CLASSES = {
    "vllm": ("services.inference.engines.vllm", "VllmEngine"),
    "stub": ("services.inference.engines.stub", "StubEngine"),
}
# Read by the libraries while they are imported, and inherited by the processes that they start.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A fork would copy the locks and threads of gRPC and of the event loop.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_ENVIRONMENT_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


async def open_engine(kind: str, model_path: Path, settings: EngineSettings, *, stub_token_s: float = 0.0) -> Engine:
    """Construct, not start. ValueError for an unknown kind, EngineFailed when its libraries are not installed."""
    if kind not in _CLASSES:
        raise ValueError(f"unknown engine {kind!r}, expected one of {', '.join(sorted(_CLASSES))}")
    module_name, class_name = _CLASSES[kind]
    if kind == "vllm":
        os.environ.update(_ENVIRONMENT)
        for name, value in _ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
    try:
        # In a thread: importing vLLM takes about eight seconds and the process has to answer health checks meanwhile.
        module = await asyncio.to_thread(importlib.import_module, module_name)
    except ImportError as error:
        raise EngineFailed(f"engine {kind} is not installed: {error}") from error
    slowed = {"token_s": stub_token_s} if kind == "stub" else {}
    return cast(Engine, getattr(module, class_name)(model_path, settings, **slowed))
