"""Whether the weights of a base model are all there: whole files, no missing tensor, no NaN and no infinity.

transformers draws what is missing at random and says so in a warning. A model made of that would be trained and billed.
It knows no architecture.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.trainer.train.settings.failures import Failure, user_failure

_INDEX = "model.safetensors.index.json"
# Names in a message; the number of the others follows.
_NAMED_MAX = 5


def require_whole_files(directory: Path) -> None:
    """Compares the headers with the lengths of the files; no tensor is read. Raises Failure(user, MODEL_INVALID)."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise _unfit(f"its file {path.name} is damaged or was not copied whole: {error}") from error
    if (directory / _INDEX).is_file():
        _require_listed_files(directory)


def require_all_found(missing: Collection[str], of_other_shapes: Collection[str]) -> None:
    """Both arguments name tensors of the architecture: those that no file has, and those that a file has in another
    shape. Raises Failure(user, MODEL_INVALID)."""
    if missing:
        raise _unfit(f"no file holds the weights of {listed(missing)}")
    if of_other_shapes:
        raise _unfit(f"its files hold weights of other shapes than its config says in {listed(of_other_shapes)}")


def require_numbers(weights: Mapping[str, Any]) -> None:
    """One pass over the weights, without a copy of any, and one read from the device. Raises Failure(user,
    MODEL_INVALID)."""
    wrong = no_numbers(weights)
    if wrong:
        raise _unfit(f"its weights are no numbers (NaN or infinite) in {listed(wrong)}")


def no_numbers(weights: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    if not weights:
        return []
    sums = torch.stack([weight.detach().sum(dtype=torch.float32) for weight in weights.values()])
    suspect = [name for name, total in zip(weights, sums.tolist(), strict=True) if not math.isfinite(total)]
    # A sum may overflow where no number does.
    return [name for name in suspect if not torch.isfinite(weights[name].detach()).all().item()]


def _require_listed_files(directory: Path) -> None:
    try:
        named = set(json.loads((directory / _INDEX).read_bytes())["weight_map"].values())
        missing = sorted(name for name in named if not (directory / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(f"its file {_INDEX} cannot be read: {error!r}") from error
    if missing:
        raise _unfit(f"{_INDEX} names files that are not there: {listed(missing)}")


def listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMED_MAX]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _unfit(why: str) -> Failure:
    return user_failure("MODEL_INVALID", f"the base model cannot be used: {why}")
