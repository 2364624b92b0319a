"""Between the gateway's domain values and protobuf. The only file here that knows both."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict

from google.protobuf.message import Message

from chassis.errors import invalid
from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.artifacts.v1 import artifact_pb2, file_artifact_service_pb2
from finemesh.files.v1 import file_pb2, file_service_pb2
from finemesh.identity.v1 import identity_pb2
from services.gateway.files.domain import Storage, StoredFile, artifact_key
from services.gateway.identity.domain import ApiKey, Organization, Project

_STATES = {"ready": file_pb2.FILE_STATE_READY, "invalid": file_pb2.FILE_STATE_INVALID}
_ROLES = {
    "member": identity_pb2.ROLE_MEMBER,
    "admin": identity_pb2.ROLE_ADMIN,
    "operator": identity_pb2.ROLE_OPERATOR,
}
_ROLE_NAMES: dict[int, str] = {value: name for name, value in _ROLES.items()}


def file_to_proto(file: StoredFile) -> file_pb2.File:
    return file_pb2.File(
        name=format_name(file_pb2.File, project=file.project_id, file=file.file_id),
        display_name=file.display_name,
        purpose=file_pb2.FILE_PURPOSE_FINE_TUNE,
        state=_STATES[file.state],
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        format=file_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{(file.format or 'unspecified').upper()}"),
        line_count=file.line_count,
        validation=file_pb2.ValidationReport(
            valid=file.error_count == 0,
            errors=[
                file_pb2.DatasetError(line=e.line, path=e.path, expectation=e.expectation, found=e.found)
                for e in file.errors
            ],
            error_count=file.error_count,
        ),
        create_time=time_to_proto(file.create_time),
        features=file_pb2.DatasetFeatures(**dict.fromkeys(file.features, True)),
    )


def storage_to_proto(storage: Storage) -> file_service_pb2.Storage:
    return file_service_pb2.Storage(**asdict(storage))


def resolved_file_to_proto(file: StoredFile) -> file_artifact_service_pb2.ResolveFileResponse:
    """A READY file as other services see it."""
    assert file.format is not None
    entry = artifact_pb2.ArtifactFile(
        path="", size_bytes=file.size_bytes, sha256=file.sha256, work_bytes=file.work_bytes
    )
    return file_artifact_service_pb2.ResolveFileResponse(
        artifact=artifact_pb2.Artifact(key=artifact_key(file.project_id, file.file_id), files=[entry]),
        format=file.format,
        line_count=file.line_count,
    )


def organization_to_proto(organization: Organization) -> identity_pb2.Organization:
    return identity_pb2.Organization(
        name=format_name(identity_pb2.Organization, organization=organization.organization_id),
        display_name=organization.display_name,
        create_time=time_to_proto(organization.create_time),
    )


def project_to_proto(project: Project) -> identity_pb2.Project:
    return identity_pb2.Project(
        name=format_name(identity_pb2.Project, project=project.project_id),
        slug=project.slug,
        display_name=project.display_name,
        organization=format_name(identity_pb2.Organization, organization=project.organization_id),
        create_time=time_to_proto(project.create_time),
    )


def key_to_proto(key: ApiKey) -> identity_pb2.ApiKey:
    return identity_pb2.ApiKey(
        name=format_name(identity_pb2.ApiKey, project=key.project_id, key=key.key_id),
        display_name=key.display_name,
        secret_prefix=key.secret_prefix,
        roles=[_ROLES[role] for role in key.roles],
        create_time=time_to_proto(key.create_time),
        revoke_time=time_to_proto(key.revoke_time),
    )


def roles_from_proto(roles: Iterable[int]) -> frozenset[str]:
    """InvalidArgument for a value that is no role."""
    values = list(roles)
    for index, value in enumerate(values):
        if value not in _ROLE_NAMES:
            raise invalid(f"roles[{index}]", "must be one of ROLE_MEMBER, ROLE_ADMIN, ROLE_OPERATOR")
    return frozenset(_ROLE_NAMES[value] for value in values)


def fingerprint(request: Message, parent: str) -> bytes:
    """SHA-256 of what a create asks for, whatever its request_id and however its parent was spelled."""
    meant = type(request)()
    meant.CopyFrom(request)
    meant.ClearField("request_id")
    if "parent" in meant.DESCRIPTOR.fields_by_name:
        meant.ClearField("parent")
    content = meant.SerializeToString(deterministic=True)
    return hashlib.sha256(f"{meant.DESCRIPTOR.full_name}\0{parent}\0".encode() + content).digest()


def checked_request_id(request_id: str, field: str = "request_id") -> str:
    if len(request_id) > 128 or not request_id.isprintable():
        raise invalid(field, "must be 1 to 128 printable characters, or empty for none")
    return request_id


def checked_display_name(display_name: str, field: str = "display_name") -> str:
    if len(display_name) > 200 or not display_name.isprintable():
        raise invalid(field, "must be at most 200 printable characters")
    return display_name
