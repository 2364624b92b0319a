"""Pushes an exported model to a repository of the Hugging Face hub. Not pure: the network, files.

A program: `python -m services.trainer.integrations.hub.push`. Its request says what goes where, its answer how it
ended. The same push again makes no second commit. Files go up by plain HTTP (git LFS), as they are; no model card is
written and nothing in the repository is removed. It knows no job.
"""

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from services.trainer.integrations.programs import answer_one, root_of

RETRIED = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})


def push(request: Mapping[str, Any]) -> dict[str, Any]:
    """{"commit", "url"} or {"error", "retryable"}; no answer holds the token."""
    folder = Path(request["folder"])
    api = HfApi(endpoint=request["endpoint"], token=request["token"])
    try:
        repository = api.create_repo(request["repository"], private=True, exist_ok=True).repo_id
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in request["files"]],
            commit_message=request["message"],
        )
    except HfHubHTTPError as error:
        return http_failure(error)
    except Exception as error:
        # The network, a broken upload, a malformed answer. Only the kind is told: messages may hold signed addresses.
        return {"error": f"the hub could not be reached or refused a file ({root_of(error)})", "retryable": True}
    return {"commit": commit.oid, "url": commit.repo_url.url if commit.repo_url else ""}


def http_failure(error: HfHubHTTPError) -> dict[str, Any]:
    """{"error", "retryable"}"""
    status = error.response.status_code
    return {
        "error": f"the hub answered {status} ({type(error).__name__})",
        "retryable": status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in RETRIED,
    }


if __name__ == "__main__":
    answer_one(push)
