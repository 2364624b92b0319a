"""The services outside of the mesh that a run reports to: what may be asked for, and what is wrong with a request.

It sees secrets only to say that one is missing or cannot be one; no description ever repeats them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.scheduler.spec.tuning_spec import HUB_REPOSITORY, Integrations, Violation

SECRET_CHARS_MAX = 512
RUN_NAME_CHARS_MAX = 128
WANDB_PROJECT_DEFAULT = "finemesh"

_AT = "spec.integrations"
_WANDB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SECRET = re.compile(rf"[!-~]{{1,{SECRET_CHARS_MAX}}}")


@dataclass(frozen=True, kw_only=True)
class ProvidedSecrets:
    """The secrets of a request, which are never printed."""

    wandb_api_key: str
    hub_token: str

    def __repr__(self) -> str:
        return "ProvidedSecrets(...)"

    @property
    def is_empty(self) -> bool:
        return not self.wandb_api_key and not self.hub_token


def violations_of(
    asked: Integrations,
    given: ProvidedSecrets | None,
    *,
    urls_allowed: Sequence[str],
    wandb_offline: bool,
    reads_hub: bool = False,
) -> list[Violation]:
    """Everything that is wrong with the integrations and their secrets; None asks for no secrets.

    `reads_hub`: the run starts from a repository, which may be a public one.
    """
    found: list[Violation] = []

    def refuse(field: str, description: str) -> None:
        found.append(Violation(field=field, description=description))

    wandb, repository = asked.wandb, asked.hub_repository
    if wandb is not None:
        if wandb.base_url and wandb.base_url.rstrip("/") not in urls_allowed:
            refuse(f"{_AT}.wandb.base_url", f"must be one that this mesh allows: {', '.join(urls_allowed)}")
        for name, value in (("project", wandb.project), ("entity", wandb.entity)):
            if value and not _WANDB_NAME.fullmatch(value):
                refuse(f"{_AT}.wandb.{name}", "must be 1 to 128 letters, digits, `.`, `_` or `-`")
        if len(wandb.run_name) > RUN_NAME_CHARS_MAX or not wandb.run_name.isprintable():
            refuse(f"{_AT}.wandb.run_name", f"must be at most {RUN_NAME_CHARS_MAX} printable characters")
    if repository is not None and not HUB_REPOSITORY.fullmatch(repository):
        refuse(f"{_AT}.hub_push.repository", "must be `{owner}/{name}` as the hub names repositories")
    return found if given is None else found + _violations_of_secrets(asked, given, wandb_offline, reads_hub)


def _violations_of_secrets(
    asked: Integrations, given: ProvidedSecrets, wandb_offline: bool, reads_hub: bool
) -> list[Violation]:
    found: list[Violation] = []
    pushes = asked.hub_repository is not None
    place_of_hub = f"{_AT}.hub_push" if pushes else f"{_AT}.hub_push or spec.from_hub"

    def refuse(field: str, description: str) -> None:
        found.append(Violation(field=field, description=description))

    for field, value, wanted, optional, place in (
        ("secrets.wandb_api_key", given.wandb_api_key, asked.wandb is not None, wandb_offline, f"{_AT}.wandb"),
        ("secrets.hub_token", given.hub_token, pushes or reads_hub, not pushes, place_of_hub),
    ):
        if value and not wanted:
            refuse(field, f"belongs to {place}, which is not asked for")
        elif value and not _SECRET.fullmatch(value):
            refuse(field, f"must be 1 to {SECRET_CHARS_MAX} visible ASCII characters")
        elif wanted and not value and not optional:
            refuse(field, f"is missing; {place} needs it")
    return found


def completed(asked: Integrations, *, job_id: str, urls_allowed: Sequence[str]) -> Integrations:
    """With every default filled in."""
    wandb = asked.wandb
    if wandb is None:
        return asked
    filled = replace(
        wandb,
        base_url=(wandb.base_url or urls_allowed[0]).rstrip("/"),
        project=wandb.project or WANDB_PROJECT_DEFAULT,
        run_name=wandb.run_name or job_id,
    )
    return replace(asked, wandb=filled)
