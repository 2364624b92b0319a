"""Weights of an earlier job as the start of a new run: its adapter, or all its weights. The optimizer starts anew.

It knows no position: what an earlier run had still to do is none of this one's business.
"""

import json
from pathlib import Path

from safetensors import SafetensorError

from services.trainer.train.checkpoint import STATE
from services.trainer.train.export import read_trained_weights, weights_file
from services.trainer.train.failures import Failure, user_failure
from services.trainer.train.model import CausalModel
from services.trainer.train.spec import Spec

_CONFIG = "config.json"


def base_directory(spec: Spec) -> Path:
    """The model folder to load: a job that trained all weights shipped a whole one."""
    start = spec.start_from
    if start is not None and spec.training.type == "full" and (Path(start.directory) / _CONFIG).is_file():
        return Path(start.directory)
    return Path(spec.base_model.directory)


def load_start(model: CausalModel, spec: Spec) -> None:
    """Puts the weights of the earlier job in. Raises Failure(user, MODEL_INVALID) for those of another base, rank or modules."""
    start = spec.start_from
    if start is None or base_directory(spec) == Path(start.directory):
        return
    _check_base(spec, Path(start.directory))
    name = weights_file(spec)
    if not (Path(start.directory) / name).is_file():
        raise _unfit(spec, f"there is no {name} among the files; continue from the model that the job shipped")
    try:
        read_trained_weights(model, spec, Path(start.directory))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unfit(spec, str(error)) from error


def _check_base(spec: Spec, folder: Path) -> None:
    """Two bases may have layers of the same shapes. A checkpoint says which one it belongs to; an exported adapter does not."""
    if not (folder / STATE).is_file():
        return
    try:
        revision = json.loads((folder / STATE).read_bytes())["identity"]["base_revision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unfit(spec, f"{STATE} cannot be read: {error}") from error
    if revision != spec.base_model.revision:
        raise _unfit(spec, f"they belong to base model revision {revision!r}, not {spec.base_model.revision!r}")


def _unfit(spec: Spec, why: str) -> Failure:
    assert spec.start_from is not None
    return user_failure(
        "MODEL_INVALID",
        f"the weights of {spec.start_from.tuning_job or 'the earlier job'} do not fit this base model and these settings: {why}",
    )
