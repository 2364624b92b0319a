"""Pushes an exported model to a repository of the Hugging Face hub: `python -m services.trainer.outside.push`.

One JSON object on stdin says what goes where, one on stdout how it ended. The same push again makes no second commit. Files go up
by plain HTTP (git LFS), as they are; no card is written and nothing in the repository is removed. It knows no job.
"""

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from services.trainer.outside.question import answer_one, root_of

RETRIED = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})


def push(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """{"commit", "url"} or {"error", "retryable"}; no answer holds the token."""
    folder = Path(wanted["folder"])
    api = HfApi(endpoint=wanted["endpoint"], token=wanted["token"])
    try:
        repository = api.create_repo(wanted["repository"], private=True, exist_ok=True).repo_id
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in wanted["files"]],
            commit_message=wanted["message"],
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        return {
            "error": f"the hub answered {status} ({type(error).__name__})",
            "retryable": status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in RETRIED,
        }
    except Exception as error:
        # The network, an upload that broke, an answer that is none. Only the kind is told: texts may hold signed addresses.
        return {"error": f"the hub could not be reached or refused a file ({root_of(error)})", "retryable": True}
    return {"commit": commit.oid, "url": commit.repo_url.url if commit.repo_url else ""}


if __name__ == "__main__":
    answer_one(push)
