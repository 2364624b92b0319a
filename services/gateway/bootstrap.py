"""Makes the first organization, project and key of a platform. Not pure: database, protobuf.

It writes straight into the database and prints the key once. Run it as `python -m services.gateway.bootstrap`; it
refuses when there is an organization, unless told `--new-key`.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from datetime import datetime

import structlog

from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Connection, open_pool, transaction
from chassis.identity import Caller
from chassis.ids import Ids, SystemIds
from chassis.names import format_name
from chassis.telemetry import logs
from chassis.telemetry import trace as telemetry
from finemesh.identity.v1 import identity_pb2
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.identity import keys
from services.gateway.identity.domain import RESERVED_SLUGS, ROLES, SLUG, ApiKey, Organization, Project
from services.gateway.identity.store import IdentityStore
from services.gateway.requests import audit

log = structlog.get_logger()

_ACTOR = "bootstrap"


class Refused(Exception):
    """What was asked for does not fit what the database holds; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.bootstrap", description=__doc__)
    parser.add_argument("--organization", default="demo", help="display name of the organization")
    parser.add_argument("--project", default="default", help="display name of the project")
    parser.add_argument("--slug", default="default", help="the project's short name, the namespace of its models")
    parser.add_argument("--new-key", action="store_true", help="make another key of the existing project")
    options = parser.parse_args(arguments)
    settings = GatewaySettings()
    logs.configure(settings)
    try:
        made = asyncio.run(_bootstrap(settings, options))
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


async def _bootstrap(settings: GatewaySettings, options: argparse.Namespace) -> dict[str, str]:
    clock = SystemClock()
    telemetry.carry(None)
    ids, now = SystemIds(clock), clock.now()
    pool = await open_pool(settings)
    try:
        await migrate(pool, [MIGRATIONS])
        async with transaction(pool) as connection:
            # Two bootstraps at once must not both find an empty database.
            store = IdentityStore(connection)
            await store.lock_bootstrap()
            organizations = await store.count_organizations()
            if options.new_key:
                project = await store.project_by_slug(options.slug)
                if project is None:
                    raise Refused(f"there is no project with the slug {options.slug}; run this without --new-key first")
            elif organizations:
                raise Refused(f"there are {organizations} organizations already; --new-key makes a key of a project")
            else:
                project = await _make_first(connection, ids, options, now)
            secret = await _make_key(connection, ids, project, now)
    finally:
        await pool.close()
    return {
        "organization": format_name(identity_pb2.Organization, organization=project.organization_id),
        "project": format_name(identity_pb2.Project, project=project.project_id),
        "slug": project.slug,
        "api_key": secret,
    }


async def _make_first(connection: Connection, ids: Ids, options: argparse.Namespace, now: datetime) -> Project:
    if not SLUG.fullmatch(options.slug) or options.slug in RESERVED_SLUGS:
        raise Refused(f"{options.slug!r} cannot be a slug: 3 to 40 lower-case letters, digits and inner hyphens")
    organization = Organization(organization_id=ids.new("org_"), display_name=options.organization, create_time=now)
    project = Project(
        project_id=ids.new("proj_"),
        organization_id=organization.organization_id,
        slug=options.slug,
        display_name=options.project,
        create_time=now,
    )
    store = IdentityStore(connection)
    await store.add_organization(organization)
    await store.add_project(project)
    name = format_name(identity_pb2.Project, project=project.project_id)
    await audit.record(connection, _caller(project), now, "/finemesh.identity.v1.IdentityService/CreateProject", name)
    return project


async def _make_key(connection: Connection, ids: Ids, project: Project, now: datetime) -> str:
    secret = keys.new_secret()
    key = ApiKey(
        key_id=ids.new("key_"),
        project_id=project.project_id,
        display_name=_ACTOR,
        secret_prefix=keys.shown_prefix(secret),
        roles=ROLES,
        create_time=now,
        revoke_time=None,
    )
    await IdentityStore(connection).add_key(key, keys.digest(secret))
    name = format_name(identity_pb2.ApiKey, project=project.project_id, key=key.key_id)
    await audit.record(connection, _caller(project), now, "/finemesh.identity.v1.IdentityService/CreateApiKey", name)
    return secret


def _caller(project: Project) -> Caller:
    return Caller(service="", tenant=project.project_id, account=project.organization_id, subject=_ACTOR)


if __name__ == "__main__":
    sys.exit(main())
