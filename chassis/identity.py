"""Who is calling: the peer service by its certificate, and the user that a trusted peer speaks for.

It does not authenticate anybody; it only carries what the server established.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from chassis.errors import PermissionDenied

TENANT_KEY = "x-finemesh-tenant"
ACCOUNT_KEY = "x-finemesh-account"
SUBJECT_KEY = "x-finemesh-subject"
ROLES_KEY = "x-finemesh-roles"
NAMESPACE_KEY = "x-finemesh-namespace"
IDENTITY_KEYS = frozenset({TENANT_KEY, ACCOUNT_KEY, SUBJECT_KEY, ROLES_KEY, NAMESPACE_KEY})

_VALUE = re.compile(r"[A-Za-z0-9._@-]{0,128}")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """`service` is the name on the peer's certificate, empty on a public server, and `instance` which of its processes
    it is, where the certificate says so. The rest is empty when the peer speaks for itself: `tenant` is a project id,
    `account` an organization id, `subject` a key id, `namespace` what the tenant's own names stand under."""

    service: str
    instance: str = ""
    tenant: str = ""
    account: str = ""
    subject: str = ""
    roles: frozenset[str] = frozenset()
    namespace: str = ""

    @property
    def is_user(self) -> bool:
        """Whether what is called for is a user's: on a public server always, elsewhere when the peer speaks for one."""
        return not self.service or bool(self.tenant or self.account or self.subject)

    def require_role(self, role: str) -> None:
        if role not in self.roles:
            raise PermissionDenied("ROLE_MISSING", f"this call needs the role {role!r}", metadata={"role": role})


_current: ContextVar[Caller | None] = ContextVar("finemesh_caller", default=None)


def current_caller() -> Caller:
    """The caller of the call being served; outside of a call this is a mistake of the program."""
    caller = _current.get()
    if caller is None:
        raise LookupError("no call is being served here, so there is no caller")
    return caller


def caller_or_none() -> Caller | None:
    return _current.get()


def set_caller(caller: Caller) -> None:
    """For the server, which runs each call in a task of its own."""
    _current.set(caller)


@contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Calls made inside are made for `caller`; for background work on behalf of a user, and for tests."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


def metadata_of(caller: Caller) -> list[tuple[str, str]]:
    """What travels to the next hop; nothing when the caller speaks for itself."""
    if not caller.tenant and not caller.account and not caller.subject:
        return []
    return [
        (TENANT_KEY, caller.tenant),
        (ACCOUNT_KEY, caller.account),
        (SUBJECT_KEY, caller.subject),
        (ROLES_KEY, ",".join(sorted(caller.roles))),
        (NAMESPACE_KEY, caller.namespace),
    ]


def caller_from(service: str, metadata: Mapping[str, str]) -> Caller:
    """The caller as a trusted peer described it. The caller of this function vouches for the trust."""
    values = {key: metadata.get(key, "") for key in (TENANT_KEY, ACCOUNT_KEY, SUBJECT_KEY, NAMESPACE_KEY)}
    roles = frozenset(filter(None, metadata.get(ROLES_KEY, "").split(",")))
    for value in (*values.values(), *roles):
        if not _VALUE.fullmatch(value):
            raise PermissionDenied("CALLER_NOT_ALLOWED", "the forwarded identity is malformed")
    return Caller(
        service=service,
        tenant=values[TENANT_KEY],
        account=values[ACCOUNT_KEY],
        subject=values[SUBJECT_KEY],
        roles=roles,
        namespace=values[NAMESPACE_KEY],
    )
