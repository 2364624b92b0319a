"""The weights that a new run starts from: those of an earlier job, or of a repository of a model hub.

They are an adapter or all weights. The optimizer starts anew. It knows no position: what the earlier run had still to
do does not matter here.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig

from services.trainer.train.checkpoint.manifest import SHARDS, STATE
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.fsdp import load_weights
from services.trainer.train.modeling.start_adapter import unfit
from services.trainer.train.modeling.trained_weights import read_trained_weights, weights_file
from services.trainer.train.runtime.process_group import Group
from services.trainer.train.settings.spec import Spec

_CONFIG = "config.json"
# Fields of a config that do not decide the computation: its writer, how weights lie on disk, hints to a server.
_OF_NO_SHAPE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "initializer_range",
        "id2label",
        "label2id",
    }
)
_OF_THE_BASE = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


def base_directory(spec: Spec) -> Path:
    """The model folder to load. A job that trained all weights shipped a whole one."""
    start = spec.start_from
    if start is not None and spec.training.type == "full" and (Path(start.directory) / _CONFIG).is_file():
        return Path(start.directory)
    return Path(spec.base_model.directory)


def check_shape(spec: Spec) -> None:
    """Checks, before it is loaded, that a whole model from a hub computes what this base computes. The model of an
    earlier job was made of this base. Raises Failure(user, MODEL_INVALID) with the first setting that differs."""
    start = spec.start_from
    if start is None or not start.repository or spec.training.type != "full":
        return
    found, expected = (_config_of(Path(folder), spec) for folder in (start.directory, spec.base_model.directory))
    for name in sorted((found | expected).keys() - _OF_NO_SHAPE - _OF_THE_BASE):
        if found.get(name) != expected.get(name):
            raise unfit(spec, f"its {name} is {found.get(name)!r:.80}; the base model's is {expected.get(name)!r:.80}")


def _config_of(folder: Path, spec: Spec) -> dict[str, Any]:
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        ).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unfit(spec, f"config.json cannot be read: {error!s:.200}") from error
    return config


def load_start(model: CausalModel, spec: Spec, group: Group) -> None:
    """Puts the weights of the earlier job in. Raises Failure(user, MODEL_INVALID) for those of another base, rank or
    modules."""
    start = spec.start_from
    if start is None:
        return
    if base_directory(spec) == Path(start.directory):
        if start.repository:
            _keep_tokens_of_base(model, spec)
        return
    folder = Path(start.directory)
    _check_base(spec, folder)
    in_shards = (folder / SHARDS).is_dir()
    name = SHARDS if in_shards else weights_file(spec)
    if not in_shards and not (folder / name).is_file():
        raise unfit(spec, f"there is no {name} among the files; continue from the model that the job shipped")
    try:
        if in_shards:
            load_weights(folder / SHARDS, model.trainable, group)
        else:
            read_trained_weights(model, spec, folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unfit(spec, f"{name}: {error}") from error


def _check_base(spec: Spec, folder: Path) -> None:
    """Two bases may have layers of the same shapes. A checkpoint says which one it belongs to; an exported adapter does
    not."""
    if not (folder / STATE).is_file():
        return
    try:
        revision = json.loads((folder / STATE).read_bytes())["identity"]["base_revision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unfit(spec, f"{STATE} cannot be read: {error}") from error
    if revision != spec.base_model.revision:
        raise unfit(spec, f"they belong to base model revision {revision!r}, not {spec.base_model.revision!r}")


def _keep_tokens_of_base(model: CausalModel, spec: Spec) -> None:
    """Tokenizer and chat template are the base's, so the ids of its special tokens are kept, too."""
    expected = _config_of(Path(spec.base_model.directory), spec)
    for name in _OF_THE_BASE & expected.keys():
        setattr(model.base.config, name, expected[name])
