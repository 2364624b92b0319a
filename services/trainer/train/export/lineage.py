"""Where weights come from, in digests, so that anyone can check them or make them again.

Nothing here depends on paths or the time of day. A run that was killed and went on elsewhere has the lineage of an
undisturbed one, except for the hardware that it names.
"""

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import peft
import tokenizers
import torch
import transformers

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.settings.spec import Spec

CODE_VERSION = 1
_CPU_FACTS = Path("/proc/cpuinfo")
_ROOT = Path(__file__).parents[4]
_SOURCES = ("formats", "services/trainer/train")


def lineage_of(inputs: Inputs, position: Position) -> dict[str, Any]:
    """For a JSON document. `spec` holds every setting that decides the weights, `spec_digest` is its digest;
    `train_token_count` is that of one epoch, `train_tokens` what was trained and metered."""
    spec = inputs.spec
    rows = inputs.train.rows
    return {
        "base_model": {"id": spec.base_model.id, "revision": spec.base_model.revision},
        "train_sha256": inputs.train.sha256,
        "validation_sha256": inputs.validation.sha256 if inputs.validation else None,
        "packing_digest": inputs.train.sequences.digest,
        "tokenizer_sha256": inputs.folder.tokenizer_sha256,
        "template_sha256": inputs.folder.template_sha256,
        "spec": spec.decisive(),
        "spec_digest": spec.digest(),
        "answer_ends": sorted(inputs.ends),
        "seed": spec.seed,
        "max_seq_length": inputs.max_seq_length,
        "code_version": CODE_VERSION,
        "code_sha256": code_sha256(),
        "versions": library_versions(),
        "device": spec.device,
        "threads": spec.threads,
        "hardware": hardware(spec.device),
        "steps": position.step,
        "stopped_early": position.stopped_early,
        "best_step": position.best_step,
        "best_loss": position.best_loss,
        "started_from": _start_of(spec),
        "rows": rows.rows,
        "sequences": inputs.train.sequences.count,
        "train_token_count": rows.token_count,
        "trained_token_count": rows.labelled_count,
        "train_tokens": position.metered_train_tokens,
        "validation_tokens": position.metered_validation_tokens,
    }


def _start_of(spec: Spec) -> dict[str, Any] | None:
    start = spec.start_from
    if start is None:
        return None
    if start.repository:
        return {"repository": start.repository, "revision": start.revision, "sha256": start.sha256}
    return {"tuning_job": start.tuning_job, "step": start.step, "revision": start.revision, "sha256": start.sha256}


def library_versions() -> dict[str, str]:
    return {module.__name__: str(module.__version__) for module in (torch, transformers, peft, tokenizers, numpy)}


@cache
def code_sha256() -> str:
    """Of the sources of the engine and of the formats that it reads: two runs with equal ones were computed by the same
    lines."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            source = path.read_bytes()
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(source)}\0".encode())
            digest.update(source)
    return digest.hexdigest()


def hardware(device: str) -> dict[str, str]:
    """What the sums were made on: equal hardware gives equal bytes."""
    facts = {"machine": platform.machine(), "system": platform.system(), "processor": _processor()}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(torch.device(device))
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _processor() -> str:
    if _CPU_FACTS.is_file():
        for line in _CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()
