"""Pulls the weights that a run starts from out of a repository of the Hugging Face hub. Not pure: the network, files.

A program: `python -m services.trainer.integrations.hub.pull`. Its request says what goes where, its answer how it
ended. A revision is resolved once, and everything comes from that commit: an adapter's two files, or a config with all
of its safetensors, by name; never code, never pickles. It knows no job.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from chassis.time_limit import processor_seconds
from formats.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MATCHING_S_MAX,
    MATRIX_PREFIX,
    RANK_MAX,
    AdapterRefused,
    modules_of,
    plain_adapter_config,
    read_adapter_config,
    too_slow,
)
from services.trainer.integrations.hub.push import http_failure
from services.trainer.integrations.programs import answer_one, root_of

FILES_MAX = 256
SIDE_FILE_BYTES_MAX = 4 * 1024**2
ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Where the library keeps notes on a download.
_NOTES = ".cache"


class _Unfit(Exception):
    """The repository does not hold what is wanted; the text says what it lacks."""


def pull(request: Mapping[str, Any]) -> dict[str, Any]:
    """{"commit", "sha256"}, or {"error", "reason", "retryable"}. No answer holds the token.

    The digest is over the names and digests of the files as the hub has them.
    """
    api = HfApi(endpoint=request["endpoint"], token=request["token"] or False)
    folder, name = Path(request["folder"]), request["repository"]
    try:
        info = api.model_info(name, revision=request["revision"], files_metadata=True)
        files = chosen_files({each.rfilename: int(each.size or 0) for each in info.siblings or ()}, request)
        snapshot_download(
            name,
            revision=info.sha,
            allow_patterns=list(files),
            local_dir=folder,
            token=request["token"] or False,
            endpoint=request["endpoint"],
        )
        shutil.rmtree(folder / _NOTES, ignore_errors=True)
        announced = {each.rfilename: each.lfs.sha256 for each in info.siblings or () if each.lfs}
        digest = _verified(folder, files, announced)
        if request["kind"] == "adapter":
            try:
                with processor_seconds(MATCHING_S_MAX):
                    _write_plainly(folder)
            except TimeoutError:
                raise too_slow() from None
        return {"commit": info.sha, "sha256": digest}
    except (_Unfit, AdapterRefused) as error:
        return {"error": str(error), "reason": "MODEL_INVALID", "retryable": False}
    except HfHubHTTPError as error:
        failure = http_failure(error)
        return {**failure, "reason": "DEPENDENCY_UNAVAILABLE" if failure["retryable"] else "MODEL_UNKNOWN"}
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        why = "the disk of the node is full" if full else f"the hub could not be read ({root_of(error)})"
        return {"error": why, "reason": "DEPENDENCY_UNAVAILABLE", "retryable": True}


def chosen_files(sizes: Mapping[str, int], wanted: Mapping[str, Any]) -> dict[str, int]:
    """Names and sizes of the files to take; `wanted` says `kind`, adapter or full, and `bytes_max` for the weights."""
    adapter = wanted["kind"] == "adapter"
    names = ADAPTER if adapter else _names_of_model(sizes)
    missing = [name for name in names if name not in sizes]
    if missing:
        raise _Unfit(f"it has no {', no '.join(missing)}" + _hint(sizes, adapter=adapter))
    if len(names) > FILES_MAX:
        raise _Unfit(f"it has more than {FILES_MAX} files of weights")
    weights = sum(sizes[name] for name in names if name.endswith(".safetensors"))
    if weights > wanted["bytes_max"]:
        raise _Unfit(
            f"its {weights} bytes of weights are more than {wanted['bytes_max']}, which this base model can need"
        )
    if any(sizes[name] > SIDE_FILE_BYTES_MAX for name in names if not name.endswith(".safetensors")):
        raise _Unfit(f"a file of it besides the weights has more than {SIDE_FILE_BYTES_MAX} bytes")
    return {name: sizes[name] for name in names}


def _names_of_model(sizes: Mapping[str, int]) -> tuple[str, ...]:
    shards = {int(found["number"]): found for name in sizes if (found := _SHARD.fullmatch(name))}
    if WHOLE in sizes or not shards:
        return (CONFIG, WHOLE)
    counts = {int(found["count"]) for found in shards.values()}
    if len(counts) != 1 or sorted(shards) != list(range(1, counts.pop() + 1)):
        raise _Unfit("it does not have all shards of its weights")
    return (CONFIG, INDEX, *(shards[number].string for number in sorted(shards)))


def _hint(sizes: Mapping[str, int], *, adapter: bool) -> str:
    if adapter and (WHOLE in sizes or INDEX in sizes):
        return (
            "; it holds a whole model: train all weights,"
            " or import it as a base model, on which an adapter can be served"
        )
    if not adapter and ADAPTER[1] in sizes:
        return "; it holds an adapter: train an adapter to go on with it"
    return "" if adapter else "; other weight formats can carry code and are not taken"


def _verified(folder: Path, files: Mapping[str, int], announced: Mapping[str, str]) -> str:
    lines = []
    for name, size in sorted(files.items()):
        with (folder / name).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if (folder / name).stat().st_size != size or announced.get(name, digest) != digest:
            raise OSError(f"{name} is not what the hub announced")
        lines.append(f"{name}\0{digest}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_plainly(folder: Path) -> None:
    """The adapter's config in the plainest words. Its expressions are a stranger's and may take for ever: they are
    matched here, where a limit of time ends them, and by nobody later. Raises AdapterRefused."""
    config = read_adapter_config((folder / ADAPTER_CONFIG).read_bytes(), rank_max=RANK_MAX)
    ranks: dict[str, int] = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            modules = modules_of(file.keys())
            for module in modules:
                shape = file.get_slice(f"{MATRIX_PREFIX}{module}.lora_A.weight").get_shape()
                ranks[module] = shape[0] if shape else 0
    except SafetensorError as error:
        raise _Unfit(f"{ADAPTER_WEIGHTS} is no safetensors file: {error}") from error
    if config.target_parameters:
        # Matrices of fused experts have names that only peft maps to their parameters.
        return
    for module in modules:
        config.check_module(module, ranks[module])
    (folder / ADAPTER_CONFIG).write_bytes(plain_adapter_config(config, modules))


if __name__ == "__main__":
    answer_one(pull)
