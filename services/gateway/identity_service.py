"""The public IdentityService: who calls, projects of an organization, keys of a project."""

from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import AlreadyExists, FieldViolation, NotFound, PermissionDenied, ResourceExhausted
from chassis.identity import Caller, current_caller
from chassis.ids import Ids
from chassis.names import format_name, parse_name
from chassis.paging import decode_token, encode_token, page_size
from finemesh.identity.v1 import identity_pb2, identity_service_pb2, identity_service_pb2_grpc
from services.gateway import audit, convert, idempotency, keys
from services.gateway.auth import Authenticator
from services.gateway.config import GatewaySettings
from services.gateway.domain import RESERVED_SLUGS, SLUG, ApiKey, Project, roles_up_to
from services.gateway.idempotency import Request
from services.gateway.store import Store


class IdentityService(identity_service_pb2_grpc.IdentityServiceServicer):
    def __init__(
        self,
        pool: Pool,
        store: Store,
        authenticator: Authenticator,
        clock: Clock,
        ids: Ids,
        settings: GatewaySettings,
    ) -> None:
        self._pool = pool
        self._store = store
        self._authenticator = authenticator
        self._clock = clock
        self._ids = ids
        self._settings = settings

    async def GetCaller(
        self, request: identity_service_pb2.GetCallerRequest, context: Any
    ) -> identity_service_pb2.GetCallerResponse:
        caller = current_caller()
        async with self._pool.acquire() as connection:
            organization = await self._store.organization(connection, caller.account)
            project = await self._store.project(connection, caller.tenant, caller.account)
            key = await self._store.key(connection, caller.tenant, caller.subject)
        assert organization is not None and project is not None and key is not None
        return identity_service_pb2.GetCallerResponse(
            organization=convert.organization_message(organization),
            project=convert.project_message(project),
            key=convert.key_message(key),
        )

    async def CreateProject(
        self, request: identity_service_pb2.CreateProjectRequest, context: Any
    ) -> identity_service_pb2.CreateProjectResponse:
        caller = current_caller()
        caller.require_role("admin")
        if not SLUG.fullmatch(request.slug):
            raise convert.invalid("slug", "must be 3 to 40 lower-case letters, digits and inner hyphens")
        if request.slug in RESERVED_SLUGS:
            raise convert.invalid("slug", "is reserved; choose another one")
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
        stored = await self._store_project(project, repeat, caller)
        return identity_service_pb2.CreateProjectResponse(project=convert.project_message(stored))

    async def _store_project(self, project: Project, repeat: Request, caller: Caller) -> Project:
        async with transaction(self._pool) as connection:
            # Locked, so that two creates at once cannot both be the last one that fits.
            await self._store.lock_organization(connection, caller.account)
            earlier_id = await idempotency.earlier(self._store, connection, repeat)
            if earlier_id is not None:
                earlier = await self._store.project(connection, earlier_id, caller.account)
                assert earlier is not None
                return earlier
            if await self._store.count_projects(connection, caller.account) >= self._settings.projects_max:
                raise _too_many("projects", "projects_max", self._settings.projects_max)
            if not await self._store.add_project(connection, project):
                raise AlreadyExists(
                    "ALREADY_EXISTS",
                    f"the slug {project.slug} is taken; choose another one",
                    violations=[FieldViolation("slug", "is taken")],
                )
            await idempotency.claim(self._store, connection, repeat, project.project_id, project.create_time)
            name = format_name(identity_pb2.Project, project=project.project_id)
            await audit.record(self._store, connection, caller, project.create_time, "project.create", name)
        return project

    async def ListProjects(
        self, request: identity_service_pb2.ListProjectsRequest, context: Any
    ) -> identity_service_pb2.ListProjectsResponse:
        account = current_caller().account
        scope = f"projects:{account}"
        cursor = decode_token(request.page_token, scope=scope, kinds=(str,))
        after_id = "" if cursor is None else str(cursor[0])
        size = page_size(request.page_size)
        async with self._pool.acquire() as connection:
            projects = await self._store.list_projects(connection, account, after_id, size + 1)
        more = len(projects) > size
        return identity_service_pb2.ListProjectsResponse(
            projects=[convert.project_message(project) for project in projects[:size]],
            next_page_token=encode_token([projects[size - 1].project_id], scope=scope) if more else "",
        )

    async def CreateApiKey(
        self, request: identity_service_pb2.CreateApiKeyRequest, context: Any
    ) -> identity_service_pb2.CreateApiKeyResponse:
        caller = current_caller()
        caller.require_role("admin")
        project_id = _project_of(request.parent, caller)
        roles = roles_up_to(convert.role_names(request.roles))
        for role in roles:
            if role not in caller.roles:
                raise PermissionDenied(
                    "ROLE_MISSING", f"a key without the role {role!r} cannot give it", metadata={"role": role}
                )
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
        return identity_service_pb2.CreateApiKeyResponse(key=convert.key_message(key), secret=secret)

    async def _store_key(self, key: ApiKey, secret: str, repeat: Request, caller: Caller) -> None:
        name = format_name(identity_pb2.ApiKey, project=key.project_id, key=key.key_id)
        async with transaction(self._pool) as connection:
            if await self._store.lock_project(connection, key.project_id, caller.account) is None:
                raise _not_found("parent")
            if await idempotency.earlier(self._store, connection, repeat) is not None:
                raise _key_shown_before()
            if await self._store.count_live_keys(connection, key.project_id) >= self._settings.keys_per_project_max:
                raise _too_many("keys", "keys_per_project_max", self._settings.keys_per_project_max)
            if not await idempotency.claim(self._store, connection, repeat, key.key_id, key.create_time):
                raise _key_shown_before()
            await self._store.add_key(connection, key, keys.digest(secret))
            await audit.record(self._store, connection, caller, key.create_time, "key.create", name)

    async def ListApiKeys(
        self, request: identity_service_pb2.ListApiKeysRequest, context: Any
    ) -> identity_service_pb2.ListApiKeysResponse:
        caller = current_caller()
        project_id = _project_of(request.parent, caller)
        scope = f"keys:{project_id}"
        cursor = decode_token(request.page_token, scope=scope, kinds=(str,))
        before_id = "" if cursor is None else str(cursor[0])
        size = page_size(request.page_size)
        async with self._pool.acquire() as connection:
            await self._require_project(connection, project_id, caller, "parent")
            found = await self._store.list_keys(connection, project_id, before_id, size + 1)
        more = len(found) > size
        return identity_service_pb2.ListApiKeysResponse(
            keys=[convert.key_message(key) for key in found[:size]],
            next_page_token=encode_token([found[size - 1].key_id], scope=scope) if more else "",
        )

    async def RevokeApiKey(
        self, request: identity_service_pb2.RevokeApiKeyRequest, context: Any
    ) -> identity_service_pb2.RevokeApiKeyResponse:
        caller = current_caller()
        caller.require_role("admin")
        parts = parse_name(identity_pb2.ApiKey, request.name)
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            await self._require_project(connection, parts["project"], caller, "name")
            if await self._store.revoke_key(connection, parts["project"], parts["key"], now):
                await audit.record(self._store, connection, caller, now, "key.revoke", request.name)
            key = await self._store.key(connection, parts["project"], parts["key"])
        if key is None:
            raise _not_found("name")
        self._authenticator.forget_all()
        return identity_service_pb2.RevokeApiKeyResponse(key=convert.key_message(key))

    async def _require_project(self, connection: Connection, project_id: str, caller: Caller, field: str) -> None:
        """The caller's own project, or for an admin any of the organization; a stranger learns nothing."""
        if project_id == caller.tenant:
            return
        project = None
        if "admin" in caller.roles:
            project = await self._store.project(connection, project_id, caller.account)
        if project is None:
            raise _not_found(field)


def _project_of(parent: str, caller: Caller) -> str:
    return parse_name(identity_pb2.Project, parent, "parent")["project"] if parent else caller.tenant


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
