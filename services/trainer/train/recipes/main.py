"""Makes a small base model: `python -m services.trainer.train.recipes.main --name demo-llama --out DIR [--cache DIR]`.

Progress goes to standard error; the last line of standard output is a JSON object: name, directory, revision, digest,
cached, seconds. What is made depends on the recipe's digest alone, so a cached one is copied. It knows no catalogue.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from pathlib import Path

from formats.manifests import revision_of
from services.trainer.train.disk.durable import commit_folder, digest_files
from services.trainer.train.recipes.corpus import standard_library_docstrings
from services.trainer.train.recipes.model_shapes import CONTEXT_LENGTH, RECIPES, Recipe
from services.trainer.train.recipes.vocabulary import train_tokenizer, write_tokenizer

# Enough text for a tokenizer of a thousand entries, read in a moment.
_SMALL_CORPUS = "asyncio/*.py"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a small base model without a hub.")
    parser.add_argument("--name", required=True, choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, type=Path, help="folder of the model; replaced when it exists")
    parser.add_argument("--cache", type=Path, help="folder in which made models are kept")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    # Read when torch is loaded; spinning workers crawl when other processes want the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    recipe = RECIPES[arguments.name]
    cached = make(recipe, arguments.out, arguments.cache)
    answer = {
        "name": recipe.name,
        "directory": str(arguments.out),
        "revision": revision_of(digest_files(arguments.out)),
        "digest": recipe.digest(),
        "cached": cached,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def make(recipe: Recipe, out: Path, cache: Path | None) -> bool:
    """Fills `out`; returns whether it came from the cache."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if cache is None:
        commit_folder(out, lambda folder: _write(recipe, folder), manifest=None)
        return False
    made = cache / f"{recipe.name}-{recipe.digest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    # Two stacks that start for the first time would clear each other's unfinished folder; the second one waits instead.
    with (cache / f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hit = made.is_dir()
        if not hit:
            commit_folder(made, lambda folder: _write(recipe, folder), manifest=None)
    commit_folder(out, lambda folder: _copy(made, folder), manifest=None)
    return hit


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _write(recipe: Recipe, folder: Path) -> None:
    report(f"{recipe.name}: reading the standard library's docstrings")
    files = standard_library_docstrings() if recipe.pretrain_steps else standard_library_docstrings(_SMALL_CORPUS)
    texts = [text for texts in files for text in texts]
    report(f"{recipe.name}: training a tokenizer on {len(texts)} texts")
    write_tokenizer(train_tokenizer(texts, recipe.vocabulary), folder, CONTEXT_LENGTH)
    # Brings torch; a model that comes from the cache needs none.
    from services.trainer.train.recipes.pretrain import write_weights  # noqa: PLC0415

    write_weights(recipe, files, folder, lambda line: report(f"{recipe.name}: {line}"))


def report(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
