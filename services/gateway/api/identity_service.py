"""The public IdentityService: who calls, projects of an organization, keys of a project."""

from collections.abc import Iterable
from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import AlreadyExists, FieldViolation, NotFound, PermissionDenied, ResourceExhausted, invalid
from chassis.identity import Caller, current_caller
from chassis.ids import Ids
from chassis.names import parse_name
from chassis.paging import Pages
from finemesh.identity.v1 import identity_pb2, identity_service_pb2, identity_service_pb2_grpc
from services.gateway.api import convert
from services.gateway.config import GatewaySettings
from services.gateway.identity import keys
from services.gateway.identity.authenticator import Authenticator
from services.gateway.identity.domain import RESERVED_SLUGS, SLUG, ApiKey, Project, roles_up_to
from services.gateway.identity.key_watch import KeyWatch
from services.gateway.identity.namespaces import Namespaces
from services.gateway.identity.store import IdentityStore
from services.gateway.requests import idempotency
from services.gateway.requests.idempotency import Request


class IdentityService(identity_service_pb2_grpc.IdentityServiceServicer):
    def __init__(
        self,
        pool: Pool,
        authenticator: Authenticator,
        key_watch: KeyWatch,
        namespaces: Namespaces,
        clock: Clock,
        ids: Ids,
        settings: GatewaySettings,
    ) -> None:
        self._pool = pool
        self._authenticator = authenticator
        self._key_watch = key_watch
        self._namespaces = namespaces
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._pages = Pages(settings.page_token_key)

    async def GetCaller(
        self, request: identity_service_pb2.GetCallerRequest, context: Any
    ) -> identity_service_pb2.GetCallerResponse:
        caller = current_caller()
        async with self._pool.acquire() as connection:
            store = IdentityStore(connection)
            organization = await store.organization(caller.account)
            project = await store.project(caller.tenant, caller.account)
            key = await store.key(caller.tenant, caller.subject)
        assert organization is not None and project is not None and key is not None
        return identity_service_pb2.GetCallerResponse(
            organization=convert.organization_to_proto(organization),
            project=convert.project_to_proto(project),
            key=convert.key_to_proto(key),
        )

    async def CreateProject(
        self, request: identity_service_pb2.CreateProjectRequest, context: Any
    ) -> identity_service_pb2.CreateProjectResponse:
        caller = current_caller()
        caller.require_role("admin")
        if not SLUG.fullmatch(request.slug):
            raise invalid("slug", "must be 3 to 40 lower-case letters, digits and inner hyphens")
        if request.slug in RESERVED_SLUGS:
            raise invalid("slug", "is reserved; choose another one")
        project = Project(
            project_id=self._ids.new("proj_"),
            organization_id=caller.account,
            slug=request.slug,
            display_name=convert.checked_display_name(request.display_name) or request.slug,
            create_time=self._clock.now(),
        )
        repeat = Request(
            project_id=caller.tenant,
            method="CreateProject",
            request_id=convert.checked_request_id(request.request_id),
            fingerprint=convert.fingerprint(request, caller.account),
        )
        async with self._pool.acquire() as connection:
            # A refusal that is certain comes first: a claim is never given back.
            stored = await self._made_before(connection, repeat, caller)
        if stored is None:
            await self._namespaces.claim(project.slug)
            stored = await self._store_project(project, repeat, caller)
        return identity_service_pb2.CreateProjectResponse(project=convert.project_to_proto(stored))

    async def _store_project(self, project: Project, repeat: Request, caller: Caller) -> Project:
        async with transaction(self._pool) as connection:
            store = IdentityStore(connection)
            # Locked, so that two creates at once cannot both be the last one that fits.
            await store.lock_organization(caller.account)
            earlier = await self._made_before(connection, repeat, caller)
            if earlier is not None:
                return earlier
            if not await store.add_project(project, namespace_told=True):
                raise AlreadyExists(
                    "ALREADY_EXISTS",
                    f"the slug {project.slug} is taken; choose another one",
                    violations=[FieldViolation("slug", "is taken")],
                )
            await idempotency.claim(connection, repeat, project.project_id, project.create_time)
        return project

    async def _made_before(self, connection: Connection, repeat: Request, caller: Caller) -> Project | None:
        """The project that this request made before; a typed error when there is no room for another one."""
        store = IdentityStore(connection)
        earlier_id = await idempotency.earlier(connection, repeat)
        if earlier_id is not None:
            earlier = await store.project(earlier_id, caller.account)
            assert earlier is not None
            return earlier
        if await store.count_projects(caller.account) >= self._settings.projects_max:
            raise _too_many("projects", "projects_max", self._settings.projects_max)
        return None

    async def ListProjects(
        self, request: identity_service_pb2.ListProjectsRequest, context: Any
    ) -> identity_service_pb2.ListProjectsResponse:
        account = current_caller().account
        page = self._pages.read(request, scope=f"projects:{account}", kinds=(str,))
        async with self._pool.acquire() as connection:
            found = await IdentityStore(connection).list_projects(account, page.after(""), page.row_max)
        projects, token = page.cut(found, lambda project: (project.project_id,))
        return identity_service_pb2.ListProjectsResponse(
            projects=[convert.project_to_proto(project) for project in projects], next_page_token=token
        )

    async def CreateApiKey(
        self, request: identity_service_pb2.CreateApiKeyRequest, context: Any
    ) -> identity_service_pb2.CreateApiKeyResponse:
        caller = current_caller()
        caller.require_role("admin")
        project_id = _project_of(request.parent, caller)
        roles = roles_up_to(convert.roles_from_proto(request.roles))
        _require_roles(caller, roles, "give")
        secret = keys.new_secret()
        key = ApiKey(
            key_id=self._ids.new("key_"),
            project_id=project_id,
            display_name=convert.checked_display_name(request.display_name),
            secret_prefix=keys.shown_prefix(secret),
            roles=roles,
            create_time=self._clock.now(),
            revoke_time=None,
        )
        repeat = Request(
            project_id=caller.tenant,
            method="CreateApiKey",
            request_id=convert.checked_request_id(request.request_id),
            fingerprint=convert.fingerprint(request, project_id),
        )
        await self._store_key(key, secret, repeat, caller)
        return identity_service_pb2.CreateApiKeyResponse(key=convert.key_to_proto(key), secret=secret)

    async def _store_key(self, key: ApiKey, secret: str, repeat: Request, caller: Caller) -> None:
        async with transaction(self._pool) as connection:
            store = IdentityStore(connection)
            if await store.lock_project(key.project_id, caller.account) is None:
                raise _not_found("parent")
            if await idempotency.earlier(connection, repeat) is not None:
                raise _key_shown_before()
            if await store.count_live_keys(key.project_id) >= self._settings.keys_per_project_max:
                raise _too_many("keys", "keys_per_project_max", self._settings.keys_per_project_max)
            if not await idempotency.claim(connection, repeat, key.key_id, key.create_time):
                raise _key_shown_before()
            await store.add_key(key, keys.digest(secret))

    async def ListApiKeys(
        self, request: identity_service_pb2.ListApiKeysRequest, context: Any
    ) -> identity_service_pb2.ListApiKeysResponse:
        caller = current_caller()
        project_id = _project_of(request.parent, caller)
        page = self._pages.read(request, scope=f"keys:{project_id}", kinds=(str,))
        async with self._pool.acquire() as connection:
            await self._require_project(connection, project_id, caller, "parent")
            found = await IdentityStore(connection).list_keys(project_id, page.after(""), page.row_max)
        shown, token = page.cut(found, lambda key: (key.key_id,))
        return identity_service_pb2.ListApiKeysResponse(
            keys=[convert.key_to_proto(key) for key in shown], next_page_token=token
        )

    async def RevokeApiKey(
        self, request: identity_service_pb2.RevokeApiKeyRequest, context: Any
    ) -> identity_service_pb2.RevokeApiKeyResponse:
        caller = current_caller()
        caller.require_role("admin")
        parts = parse_name(identity_pb2.ApiKey, request.name)
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            store = IdentityStore(connection)
            await self._require_project(connection, parts["project"], caller, "name")
            key = await store.key(parts["project"], parts["key"])
            if key is None:
                raise _not_found("name")
            _require_roles(caller, key.roles, "take away")
            if await store.revoke_key(parts["project"], parts["key"], now):
                key = await store.key(parts["project"], parts["key"])
                assert key is not None
        self._authenticator.forget_all()
        self._key_watch.look()
        return identity_service_pb2.RevokeApiKeyResponse(key=convert.key_to_proto(key))

    async def _require_project(self, connection: Connection, project_id: str, caller: Caller, field: str) -> None:
        """The caller's own project, or for an admin any of the organization; a stranger learns nothing."""
        if project_id == caller.tenant:
            return
        project = None
        if "admin" in caller.roles:
            project = await IdentityStore(connection).project(project_id, caller.account)
        if project is None:
            raise _not_found(field)


def _project_of(parent: str, caller: Caller) -> str:
    return parse_name(identity_pb2.Project, parent, "parent")["project"] if parent else caller.tenant


def _require_roles(caller: Caller, roles: Iterable[str], deed: str) -> None:
    for role in roles:
        if role not in caller.roles:
            raise PermissionDenied(
                "ROLE_MISSING", f"a key without the role {role!r} cannot {deed} it", metadata={"role": role}
            )


def _not_found(field: str) -> NotFound:
    return NotFound("NOT_FOUND", f"{field} names nothing that exists in this organization")


def _too_many(what: str, limit: str, maximum: int) -> ResourceExhausted:
    return ResourceExhausted(
        "SIZE_LIMIT", f"there are {maximum} {what}, as many as {limit} allows", metadata={"limit": limit}
    )


def _key_shown_before() -> AlreadyExists:
    return AlreadyExists(
        "ALREADY_EXISTS",
        "this request created its key before, and a secret is shown only once; revoke that key and create another one",
        violations=[FieldViolation("request_id", "was used to create a key")],
    )
