"""The weights that the optimizer moves, as files that others load: peft's adapter files, or safetensors.

A checkpoint and an export hold the same files. Equal weights give equal bytes. It knows no optimizer.
"""

import json
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from formats.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from services.trainer.train.modeling.base_files import listed, no_numbers
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.fsdp import copy_whole
from services.trainer.train.settings.spec import Spec

FULL_WEIGHTS = "model.safetensors"
Tensors = dict[str, Any]
# One entry only: the header lists metadata in no fixed order.
_METADATA = {"format": "pt"}


def write_trained_weights(model: CausalModel, spec: Spec, folder: Path, trained: Tensors | None = None) -> None:
    """Just what the optimizer moves, exactly as it is in memory; a checkpoint holds this."""
    if spec.training.type == "full":
        save_file(_plain(trained or model.trainable), folder / FULL_WEIGHTS, metadata=_METADATA)
        return
    tensors = get_peft_model_state_dict(model.module, state_dict=trained, save_embedding_layers=False)
    save_file(_plain(tensors), folder / ADAPTER_WEIGHTS, metadata=_METADATA)
    write_adapter_config(model, folder)


def write_adapter_config(model: CausalModel, folder: Path) -> None:
    """The layers, ranks and scales of the adapter, in peft's words."""
    config = _sorted_sets(model.module.peft_config["default"].to_dict()) | {"inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights_file(spec: Spec) -> str:
    """The file that `write_trained_weights` puts the weights into."""
    return FULL_WEIGHTS if spec.training.type == "full" else ADAPTER_WEIGHTS


def read_trained_weights(model: CausalModel, spec: Spec, folder: Path) -> None:
    """Raises ValueError when the tensors are not those of this model, or hold no numbers."""
    if spec.training.type == "full":
        tensors, trainable = load_file(folder / FULL_WEIGHTS), model.trainable
    else:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        trainable = get_peft_model_state_dict(model.module, state_dict=model.trainable, save_embedding_layers=False)
    _require_same(tensors, trainable)
    if wrong := no_numbers(tensors):
        raise ValueError(f"no numbers (NaN or infinite) in {listed(wrong)}")
    for name, parameter in trainable.items():
        copy_whole(parameter, tensors[name])


def _plain(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if {name: tuple(value.shape) for name, value in found.items()} != {
        name: tuple(value.shape) for name, value in expected.items()
    }:
        raise ValueError("the stored weights are not those of this model and these settings")


def _sorted_sets(value: Any) -> Any:
    """JSON has no sets, and their order changes from process to process."""
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _sorted_sets(inner) for key, inner in value.items()}
    return value
