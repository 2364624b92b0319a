"""How a run or an analysis fails: whose fault it is, a reason of the platform's closed list, and every broken field."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["user", "platform"]

# The folders of an absolute path, up to its last name; not those of an address such as https://host/path.
_FOLDERS = re.compile(r"(?<![\w.:/-])/(?:[^\s'\"/:,()]+/)+")


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One broken setting: `field` is its path in the JSON document, `description` says what was expected."""

    field: str
    description: str


class Failure(Exception):
    """Ends the run. `reason` is the name of an ErrorReason without its prefix. The loop adds how far the run had come.
    `details` are short facts for those who look for the cause.

    A message loses the folders of this machine, which errors of the system and of libraries name: users read it. The
    log has them.
    """

    def __init__(
        self,
        kind: Kind,
        reason: str,
        message: str,
        violations: Sequence[Violation] = (),
        details: Mapping[str, str] | None = None,
    ) -> None:
        message = _FOLDERS.sub("", message)
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.details = dict(details or {})
        self.step = 0
        self.last_checkpoint_step: int | None = None

    def __reduce__(self) -> tuple[type["Failure"], tuple[object, ...]]:
        """A process that tokenises sends it as a pickle."""
        return Failure, (self.kind, self.reason, self.message, self.violations, self.details)


def user_failure(
    reason: str, message: str, violations: Sequence[Violation] = (), details: Mapping[str, str] | None = None
) -> Failure:
    """The data or the settings are at fault: the same run would fail again."""
    return Failure("user", reason, message, violations, details)


def platform_failure(reason: str, message: str, details: Mapping[str, str] | None = None) -> Failure:
    """The platform is at fault: the run may go on elsewhere from its last checkpoint."""
    return Failure("platform", reason, message, details=details)


class Stopped(Exception):
    """The run was asked to end. The loop reports the last finished step."""
