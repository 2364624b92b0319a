"""Where weights come from, in digests, so that anyone can check it or do it again. Nothing here depends on paths or the time of day."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy
import peft
import torch
import transformers

from services.trainer.train.inputs import Inputs
from services.trainer.train.position import Position

CODE_VERSION = 1


def lineage_of(inputs: Inputs, position: Position) -> dict[str, Any]:
    """For a JSON document; `spec_digest` covers what decides the weights, `spec_sha256` everything."""
    spec = inputs.spec
    return {
        "base_model": {"id": spec.base_model.id, "revision": spec.base_model.revision},
        "train_sha256": inputs.train.sha256,
        "validation_sha256": inputs.validation.sha256 if inputs.validation else None,
        "packing_digest": inputs.train.sequences.digest,
        "tokenizer_sha256": inputs.folder.tokenizer_sha256,
        "template_sha256": inputs.folder.template_sha256,
        "spec_digest": spec.digest(),
        "spec_sha256": hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest(),
        "seed": spec.seed,
        "max_seq_length": inputs.max_seq_length,
        "code_version": CODE_VERSION,
        "versions": library_versions(),
        "device": spec.device,
        "threads": spec.threads,
        "steps": position.step,
        "train_tokens": position.metered_train_tokens,
        "validation_tokens": position.metered_validation_tokens,
    }


def library_versions() -> dict[str, str]:
    return {module.__name__: str(module.__version__) for module in (torch, transformers, peft, numpy)}
