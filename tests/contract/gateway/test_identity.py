"""Projects and keys over the public door: who may make them, what they show, and when a revocation takes effect."""

import asyncio
from pathlib import Path

import grpc
import pytest

from chassis.errors import NotFound, PermissionDenied
from chassis.rpc.channel import open_channel
from finemesh.identity.v1 import identity_pb2, identity_service_pb2
from finemesh.organizations.v1.organization_service_pb2 import FindOrganizationRequest
from finemesh.organizations.v1.organization_service_pb2_grpc import OrganizationServiceStub
from finemesh.tuning.v1 import tuning_service_pb2
from services.gateway.identity import keys
from tests.contract.gateway.world import Tenant, World, add_tenant, gateway_world, refused
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually


async def make_key(world: World, tenant: Tenant | None = None, **fields):
    request = identity_service_pb2.CreateApiKeyRequest(**fields)
    return await world.identities.CreateApiKey(request, metadata=world.bearer(tenant))


async def who(world: World, secret: str):
    metadata = (("authorization", f"Bearer {secret}"),)
    return await world.identities.GetCaller(identity_service_pb2.GetCallerRequest(), metadata=metadata)


async def audit(world: World) -> list[tuple[str, str]]:
    """What was done, by the short names of the methods."""
    rows = await world.pool.fetch("SELECT action, resource FROM audit_log WHERE outcome = 'OK' ORDER BY entry_id")
    return [(row["action"].rpartition("/")[2], row["resource"]) for row in rows]


async def test_a_key_says_who_it_is(world: World):
    answer = await who(world, world.acme.secret)
    assert answer.organization.name == f"organizations/{world.acme.organization_id}"
    assert (answer.project.name, answer.project.slug) == (f"projects/{world.acme.project_id}", "acme")
    assert answer.project.organization == answer.organization.name
    assert list(answer.key.roles) == [identity_pb2.ROLE_MEMBER, identity_pb2.ROLE_ADMIN, identity_pb2.ROLE_OPERATOR]
    assert world.acme.secret.startswith(answer.key.secret_prefix)
    assert not answer.key.HasField("revoke_time")


async def test_a_new_key_works_and_its_secret_is_nowhere(world: World):
    made = await make_key(world, display_name="ci")
    assert (await who(world, made.secret)).key == made.key
    assert list(made.key.roles) == [identity_pb2.ROLE_MEMBER]
    assert keys.is_well_formed(made.secret)
    row = await world.pool.fetchrow("SELECT * FROM api_keys WHERE display_name = 'ci'")
    assert row is not None
    assert made.secret not in repr(dict(row))
    assert await audit(world) == [("CreateApiKey", made.key.name)]


async def test_a_member_makes_no_keys_and_no_projects(world: World):
    member = Tenant(organization_id="", project_id="", secret=(await make_key(world)).secret)
    async with refused("ROLE_MISSING", "PERMISSION_DENIED"):
        await make_key(world, member)
    async with refused("ROLE_MISSING"):
        request = identity_service_pb2.CreateProjectRequest(slug="more")
        await world.identities.CreateProject(request, metadata=world.bearer(member))
    async with refused("ROLE_MISSING"):
        revoke = identity_service_pb2.RevokeApiKeyRequest(name="projects/p/keys/k")
        await world.identities.RevokeApiKey(revoke, metadata=world.bearer(member))


async def test_no_key_gives_a_role_that_it_lacks(world: World):
    admin = await add_tenant(world.pool, "third", roles=("member", "admin"))
    async with refused("ROLE_MISSING", "PERMISSION_DENIED"):
        await make_key(world, admin, roles=[identity_pb2.ROLE_OPERATOR])
    made = await make_key(world, admin, roles=[identity_pb2.ROLE_ADMIN])
    assert list(made.key.roles) == [identity_pb2.ROLE_MEMBER, identity_pb2.ROLE_ADMIN]
    async with refused("INVALID_FIELD"):
        await make_key(world, admin, roles=[17])


async def test_a_revoked_key_stops_at_once(world: World):
    made = await make_key(world)
    await who(world, made.secret)
    request = identity_service_pb2.RevokeApiKeyRequest(name=made.key.name)
    revoked = await world.identities.RevokeApiKey(request, metadata=world.bearer())
    assert revoked.key.HasField("revoke_time")
    async with refused("API_KEY_REVOKED", "UNAUTHENTICATED"):
        await who(world, made.secret)
    async with refused("API_KEY_REVOKED"):
        job = tuning_service_pb2.GetTuningJobRequest(name="x")
        await world.jobs.GetTuningJob(job, metadata=(("authorization", f"Bearer {made.secret}"),))
    again = await world.identities.RevokeApiKey(request, metadata=world.bearer())
    assert again == revoked
    assert [action for action, _ in await audit(world)] == ["CreateApiKey", "RevokeApiKey", "RevokeApiKey"]


async def test_no_key_revokes_one_with_a_role_that_it_lacks(world: World):
    made = await make_key(world, roles=[identity_pb2.ROLE_ADMIN])
    admin = Tenant(organization_id="", project_id="", secret=made.secret)
    operators = (await who(world, world.acme.secret)).key.name
    async with refused("ROLE_MISSING", "PERMISSION_DENIED") as told:
        request = identity_service_pb2.RevokeApiKeyRequest(name=operators)
        await world.identities.RevokeApiKey(request, metadata=world.bearer(admin))
    assert told[0].metadata["role"] == "operator"
    assert not (await who(world, world.acme.secret)).key.HasField("revoke_time")
    other_admin = (await make_key(world, roles=[identity_pb2.ROLE_ADMIN])).key.name
    request = identity_service_pb2.RevokeApiKeyRequest(name=other_admin)
    await world.identities.RevokeApiKey(request, metadata=world.bearer(admin))
    assert [action for action, _ in await audit(world)] == ["CreateApiKey", "CreateApiKey", "RevokeApiKey"]


async def test_a_key_revoked_elsewhere_stops_within_the_cache_time(world: World):
    made = await make_key(world)
    await who(world, made.secret)
    await world.pool.execute("UPDATE api_keys SET revoke_time = now() WHERE display_name = ''")
    # The promise is about time, and the gateway lives by the clock of the machine.
    await asyncio.sleep(world.settings.key_cache_s * 1.5)
    async with refused("API_KEY_REVOKED"):
        await who(world, made.secret)


async def test_keys_of_another_organization_are_not_there(world: World):
    foreign = (await make_key(world, world.other)).key.name
    request = identity_service_pb2.RevokeApiKeyRequest(name=foreign)
    async with refused("NOT_FOUND", "NOT_FOUND"):
        await world.identities.RevokeApiKey(request, metadata=world.bearer())
    parent = f"projects/{world.other.project_id}"
    async with refused("NOT_FOUND"):
        await make_key(world, parent=parent)
    async with refused("NOT_FOUND"):
        listing = identity_service_pb2.ListApiKeysRequest(parent=parent)
        await world.identities.ListApiKeys(listing, metadata=world.bearer())
    assert [action for action, _ in await audit(world)] == ["CreateApiKey"]


async def test_an_admin_makes_a_project_and_its_first_key(world: World):
    request = identity_service_pb2.CreateProjectRequest(slug="research", request_id="r1")
    project = (await world.identities.CreateProject(request, metadata=world.bearer())).project
    assert (project.slug, project.display_name) == ("research", "research")
    assert (await world.identities.CreateProject(request, metadata=world.bearer())).project == project
    request.slug = "other-slug"
    async with refused("REQUEST_ID_REUSED"):
        await world.identities.CreateProject(request, metadata=world.bearer())
    made = await make_key(world, parent=project.name)
    assert (await who(world, made.secret)).project == project
    listed = await world.identities.ListProjects(identity_service_pb2.ListProjectsRequest(), metadata=world.bearer())
    assert [found.slug for found in listed.projects] == ["acme", "research"]
    assert await audit(world) == [("CreateProject", project.name)] * 2 + [("CreateApiKey", made.key.name)]


@pytest.mark.parametrize("slug", ["", "ab", "Upper", "-edge", "edge-", "finemesh", "a b", "x" * 41, "übung"])
async def test_a_slug_has_rules(world: World, slug: str):
    async with refused("INVALID_FIELD") as told:
        request = identity_service_pb2.CreateProjectRequest(slug=slug)
        await world.identities.CreateProject(request, metadata=world.bearer())
    assert told[0].violations[0].field == "slug"


async def test_a_slug_is_unique_on_the_platform(world: World):
    async with refused("ALREADY_EXISTS", "ALREADY_EXISTS"):
        request = identity_service_pb2.CreateProjectRequest(slug="other")
        await world.identities.CreateProject(request, metadata=world.bearer())
    assert await audit(world) == []


async def test_a_slug_is_no_namespace_of_base_models(world: World):
    async with refused("ALREADY_EXISTS", "ALREADY_EXISTS"):
        request = identity_service_pb2.CreateProjectRequest(slug="llamas")
        await world.identities.CreateProject(request, metadata=world.bearer())
    assert await audit(world) == []
    request.slug = "alpacas"
    await world.identities.CreateProject(request, metadata=world.bearer())
    # Those of a bootstrap are told as well, and each is told once.
    told = await eventually(
        lambda: world.pool.fetch("SELECT slug FROM projects WHERE namespace_told ORDER BY slug"),
        lambda rows: len(rows) == 3,
    )
    assert sorted(world.names.claimed) == [row["slug"] for row in told] == ["acme", "alpacas", "other"]


async def test_a_secret_is_never_shown_twice(world: World):
    made = await make_key(world, request_id="r1")
    async with refused("ALREADY_EXISTS", "ALREADY_EXISTS"):
        await make_key(world, request_id="r1")
    async with refused("REQUEST_ID_REUSED"):
        await make_key(world, request_id="r1", display_name="changed")
    listed = await world.identities.ListApiKeys(identity_service_pb2.ListApiKeysRequest(), metadata=world.bearer())
    assert [key.name for key in listed.keys][:1] == [made.key.name]
    assert len(listed.keys) == 2


async def test_billing_alone_asks_which_organizations_exist(world: World, make_settings: SettingsFactory):
    known = FindOrganizationRequest(name=f"organizations/{world.acme.organization_id}")
    target = (world.settings.port_file or Path()).read_text().strip()
    async with open_channel(make_settings("billing"), f"127.0.0.1:{target}", "gateway") as billing:
        await OrganizationServiceStub(billing).FindOrganization(known)
        with pytest.raises(NotFound, match="org_typo"):
            request = FindOrganizationRequest(name="organizations/org_typo")
            await OrganizationServiceStub(billing).FindOrganization(request)
    with pytest.raises(PermissionDenied):
        await OrganizationServiceStub(world.mesh).FindOrganization(known)


async def test_lists_come_in_pages(world: World):
    for _ in range(4):
        await make_key(world)
    seen, token = [], ""
    while True:
        request = identity_service_pb2.ListApiKeysRequest(page_size=2, page_token=token)
        page = await world.identities.ListApiKeys(request, metadata=world.bearer())
        seen += [key.name for key in page.keys]
        token = page.next_page_token
        if not token:
            break
    assert len(seen) == len(set(seen)) == 5
    assert seen == sorted(seen, reverse=True)


async def test_projects_and_keys_are_bounded(database_url, tls_dir, tmp_path):
    limits = {"projects_max": 2, "keys_per_project_max": 2}
    async with gateway_world(database_url, tls_dir, tmp_path, **limits) as world:
        await make_key(world)
        async with refused("SIZE_LIMIT", "RESOURCE_EXHAUSTED") as told:
            await make_key(world)
        assert told[0].metadata["limit"] == "keys_per_project_max"

        async def create(slug: str) -> bool:
            request = identity_service_pb2.CreateProjectRequest(slug=slug)
            try:
                await world.identities.CreateProject(request, metadata=world.bearer())
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False
            return True

        made = await asyncio.gather(*(create(f"slug-{number}") for number in range(4)))
        assert sum(made) == 1
