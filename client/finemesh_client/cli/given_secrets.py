"""What a job's integrations are opened with, from the environment or a file: an argument could be read by every user of
this machine.

It reads only what the job asks for, and its errors name places, never contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finemesh.tuning.v1 import tuning_job_pb2, tuning_secrets_pb2
from finemesh_client.cli.runtime import OptionConflict

WANDB_VARIABLE, HUB_VARIABLE = "WANDB_API_KEY", "HF_TOKEN"
FILE_BYTES_MAX = 4096


@dataclass(frozen=True, kw_only=True)
class SecretFiles:
    """Files that win over the environment; None: not given."""

    wandb_key_file: Path | None = None
    hf_token_file: Path | None = None


def secrets_of(
    spec: tuning_job_pb2.TuningSpec, files: SecretFiles, environment: Mapping[str, str]
) -> tuning_secrets_pb2.TuningSecrets:
    """OptionConflict for a file without use, one that cannot be read, and a push without a token."""
    wandb, push = spec.integrations.HasField("wandb"), spec.integrations.HasField("hub_push")
    if files.wandb_key_file is not None and not wandb:
        raise OptionConflict("--wandb-key-file: only with --wandb-project")
    if files.hf_token_file is not None and not push and not spec.HasField("from_hub"):
        raise OptionConflict("--hf-token-file: only with --hf-push-to or --from-hf-model")
    secrets = tuning_secrets_pb2.TuningSecrets()
    if wandb:
        # A mesh that keeps such runs as files needs none: the server says whether one is missing.
        secrets.wandb_api_key = secret(files.wandb_key_file, environment.get(WANDB_VARIABLE, ""))
    if push or spec.HasField("from_hub"):
        # A public repository needs none to be read.
        secrets.hub_token = secret(files.hf_token_file, environment.get(HUB_VARIABLE, ""))
        if push and not secrets.hub_token:
            raise OptionConflict(f"--hf-push-to needs a token that may write: set {HUB_VARIABLE} or --hf-token-file")
    return secrets


def secret(file: Path | None, value: str) -> str:
    """What the file holds, or else `value`, without white space around it. OptionConflict when it cannot be read."""
    if file is None:
        return value.strip()
    try:
        with file.open("rb") as content:
            read = content.read(FILE_BYTES_MAX + 1)
        if len(read) > FILE_BYTES_MAX:
            raise OptionConflict(f"{file} holds more than {FILE_BYTES_MAX} bytes, which is no token")
        return read.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionConflict(f"{file} cannot be read as a token: {type(error).__name__}") from None
