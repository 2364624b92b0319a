"""What ends an answer: the list `eos_token_id` of a folder's generation_config.json. Not pure: disk.

Training writes it, and serving heeds it; of that file it reads nothing else. It knows no tokenizer and no template.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from formats.prompts.faults import ModelFault
from formats.strict_json import loose_object

GENERATION_CONFIG = "generation_config.json"
BYTES_MAX = 1 << 20
ENDS_MAX = 64
_EOS = "eos_token_id"


def ends_of_model(folder: Path) -> frozenset[int]:
    """Token ids that end an answer of the model in `folder`, beside its tokenizer's end of sequence: by its
    generation_config.json, or by config.json where it has none, as transformers and vLLM read it. Raises ModelFault."""
    path = folder / GENERATION_CONFIG
    return _ends(path if path.is_file() else folder / "config.json")


def ends_of_adapter(folder: Path) -> frozenset[int]:
    """Those that the adapter in `folder` brings; none where it has no generation_config.json. Raises ModelFault."""
    path = folder / GENERATION_CONFIG
    return _ends(path) if path.is_file() else frozenset()


def add_ends(folder: Path, ends: Iterable[int]) -> None:
    """Writes `ends` behind those that the folder's generation_config.json lists; makes the file where there is none and
    leaves what else it says as it is."""
    path = folder / GENERATION_CONFIG
    document = _document(path) if path.is_file() else {}
    listed = _listed(document, path.name)
    document[_EOS] = [*listed, *sorted(set(ends) - set(listed))]
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ends(path: Path) -> frozenset[int]:
    return frozenset(_listed(_document(path), path.name))


def _document(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or path.stat().st_size > BYTES_MAX:
            raise ModelFault(path.name, f"is no regular file of at most {BYTES_MAX} bytes")
        return loose_object(path.read_bytes())
    except OSError as error:
        raise ModelFault(path.name, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFault(path.name, f"cannot be read: {error}") from error


def _listed(document: dict[str, Any], name: str) -> list[int]:
    found = document.get(_EOS)
    listed = [] if found is None else found if isinstance(found, list) else [found]
    if len(listed) > ENDS_MAX or any(
        isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in listed
    ):
        raise ModelFault(name, f"holds an {_EOS} that is neither a token id nor a list of at most {ENDS_MAX} of them")
    return listed
