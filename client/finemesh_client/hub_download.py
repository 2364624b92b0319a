"""The files of a base model or of an adapter from a repository of the Hugging Face hub: one commit, names from a list,
safetensors only, sizes bounded.

What is in a repository besides is never downloaded, code least of all. Needs the extra `hub`; it knows no catalogue.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemesh_client.errors import DataLoss, InvalidRequest
from finemesh_client.files import sha256_of
from finemesh_client.models import ADAPTER_ENDS, ADAPTER_FILES

REVISION_DEFAULT = "main"
FILES_MAX = 256
SIDE_FILE_BYTES_MAX = 64 * 1024**2
WEIGHTS_BYTES_MAX = 512 * 1024**3

INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "tokenizer.json")
SIDE_FILES = frozenset(
    {
        *NEEDED,
        INDEX,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_WHOLE = "model.safetensors"
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository; `sha256` is empty where the hub does not tell it."""

    name: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """What was downloaded, and the commit that it is. The folder may hold more than the files, from earlier
    downloads."""

    folder: Path
    files: tuple[Path, ...]
    commit: str


Choose = Callable[[str, Sequence[HubFile]], list[HubFile]]


def chosen(repository: str, files: Sequence[HubFile]) -> list[HubFile]:
    """The files that a base model needs. InvalidRequest for a repository without, and for sizes over the limits."""
    weights = [file for file in files if file.name == _WHOLE] or _shards(repository, files)
    side = [file for file in files if file.name in SIDE_FILES and (file.name != INDEX or len(weights) > 1)]
    missing = [name for name in NEEDED if name not in {file.name for file in side}]
    if not weights:
        missing.append("model.safetensors (other weight formats can carry code and are not taken)")
    if missing:
        raise _refused(f"{repository} has no {', no '.join(missing)}")
    if len(weights) + len(side) > FILES_MAX:
        raise _refused(f"{repository} has more than {FILES_MAX} files of a model", "SIZE_LIMIT")
    for file in side:
        if file.size_bytes > SIDE_FILE_BYTES_MAX:
            raise _refused(f"{repository}: {file.name} has more than {SIDE_FILE_BYTES_MAX} bytes", "SIZE_LIMIT")
    if sum(file.size_bytes for file in weights) > WEIGHTS_BYTES_MAX:
        raise _refused(f"{repository} has more than {WEIGHTS_BYTES_MAX} bytes of weights", "SIZE_LIMIT")
    return [*side, *weights]


def chosen_of_adapter(repository: str, files: Sequence[HubFile]) -> list[HubFile]:
    """The files of an adapter. InvalidRequest for a repository without, and for sizes over the limits."""
    found = {file.name: file for file in files}
    if missing := [name for name in ADAPTER_FILES if name not in found]:
        whole = _WHOLE in found or INDEX in found
        hint = "; it holds a whole model: `finemesh models import`" if whole else " (other formats can carry code)"
        raise _refused(f"{repository} has no {', no '.join(missing)}{hint}")
    config, weights = (found[name] for name in ADAPTER_FILES)
    side = [config, *(found[name] for name in (ADAPTER_ENDS,) if name in found)]
    if any(file.size_bytes > SIDE_FILE_BYTES_MAX for file in side) or weights.size_bytes > WEIGHTS_BYTES_MAX:
        raise _refused(f"{repository} has more bytes than an adapter can have", "SIZE_LIMIT")
    return [*side, weights]


def fetch(repository: str, revision: str, token: str = "", *, choose: Choose = chosen) -> HubFolder:
    """Blocking. `choose` says which files. `revision` is a commit, a tag or a branch, and is resolved once: everything
    comes from that one commit."""
    try:
        # Only an import needs the hub's library, which is an extra of its own.
        from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415
    except ImportError:
        raise InvalidRequest(
            message=f"for {repository} the hub's library is needed: pip install 'finemesh[hub]'", reason="INVALID_FIELD"
        ) from None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, token=token or None)
    try:
        info = api.model_info(repository, revision=revision or REVISION_DEFAULT, files_metadata=True)
        files = choose(repository, [_described(sibling) for sibling in info.siblings or ()])
        folder = Path(
            snapshot_download(
                repository,
                revision=info.sha,
                allow_patterns=[file.name for file in files],
                token=token or None,
                endpoint=endpoint,
            )
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        message = f"{repository} at {revision or REVISION_DEFAULT} could not be had: the hub answered {status}"
        raise InvalidRequest(message=message, reason="MODEL_UNKNOWN") from None
    except OfflineModeIsEnabled:
        message = (
            f"{repository} was not asked for: HF_HUB_OFFLINE is set in the environment; unset it to import from the hub"
        )
        raise InvalidRequest(message=message, reason="MODEL_UNKNOWN") from None
    except InvalidRequest:
        raise
    except Exception as error:
        message = f"{repository} could not be had from the hub: {type(error).__name__}"
        raise InvalidRequest(message=message, reason="MODEL_UNKNOWN") from error
    for file in files:
        _verify(folder / file.name, file)
    return HubFolder(folder=folder, files=tuple(folder / file.name for file in files), commit=str(info.sha))


def _shards(repository: str, files: Sequence[HubFile]) -> list[HubFile]:
    shards = {int(found["number"]): file for file in files if (found := _SHARD.fullmatch(file.name))}
    counts = {int(found["count"]) for file in files if (found := _SHARD.fullmatch(file.name))}
    if shards and (len(counts) != 1 or sorted(shards) != list(range(1, counts.pop() + 1))):
        raise _refused(f"{repository} does not have all of its weights: {len(shards)} files of another number")
    return [shards[number] for number in sorted(shards)]


def _described(sibling: Any) -> HubFile:
    lfs = sibling.lfs
    return HubFile(name=sibling.rfilename, size_bytes=int(sibling.size or 0), sha256=lfs.sha256 if lfs else "")


def _verify(path: Path, file: HubFile) -> None:
    """The library checks sizes; of large files the hub tells the digest as well."""
    if path.stat().st_size != file.size_bytes or (file.sha256 and sha256_of(path) != file.sha256):
        raise DataLoss(
            message=f"{file.name}: the downloaded bytes are not what the hub announced", reason="DATA_CORRUPT"
        )


def _refused(message: str, reason: str = "MODEL_INVALID") -> InvalidRequest:
    return InvalidRequest(message=message, reason=reason)
