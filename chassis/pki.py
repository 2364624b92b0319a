"""The mesh's own certificate authority: one certificate per service name, made once and kept while it is valid.

Of a service whose processes must be told apart each has its own: `service@instance`, with the instance in a SPIFFE id.
It knows files and names; who may call whom is each server's list. Run it by `python -m chassis.pki --dir D name...`.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY = "ca"
AUTHORITY_VALID_DAYS = 3650
SERVICE_VALID_DAYS = 825
RENEW_BEFORE_DAYS = 30
# A clock that is a little behind must not refuse a fresh certificate.
BACKDATE = timedelta(minutes=5)

INSTANCE_MARK = "@"

_SERVICE_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_INSTANCE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Credentials:
    """What one service shows and what it trusts, all in PEM."""

    authority: bytes
    certificate: bytes
    key: bytes

    def for_server(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )

    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def load(folder: Path, service_name: str) -> Credentials:
    """Reads ca.pem, <service>.pem and <service>.key; a missing file says how to make it."""
    names = (f"{AUTHORITY}.pem", f"{service_name}.pem", f"{service_name}.key")
    try:
        authority, certificate, key = ((folder / name).read_bytes() for name in names)
    except FileNotFoundError as error:
        hint = f"`python -m chassis.pki --dir {folder} {service_name}` makes it"
        raise FileNotFoundError(f"{error.filename} is missing; {hint}") from error
    return Credentials(authority, certificate, key)


def create_authority(folder: Path) -> None:
    """Makes ca.pem and ca.key, unless a valid pair is there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _read_pair(folder, AUTHORITY) is not None:
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finemesh authority")])
    builder = _builder(name, name, key, AUTHORITY_VALID_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    _write_pair(folder, AUTHORITY, builder.sign(key, hashes.SHA256()), key)


def instance_of(service_name: str, identities: Iterable[str]) -> str:
    """Which process of the service a certificate with these subject alternative names is for; empty: any."""
    prefix = _spiffe_id(service_name, "")
    return next((each.removeprefix(prefix) for each in identities if each.startswith(prefix)), "")


def issue(folder: Path, name: str) -> None:
    """Makes <name>.pem and <name>.key, unless a valid pair of this authority is there. The name is `service`, or
    `service@instance` for one of its processes."""
    service_name, marked, instance = name.partition(INSTANCE_MARK)
    if not _SERVICE_NAME.fullmatch(service_name) or service_name == AUTHORITY:
        raise ValueError(f"{service_name!r} is no service name: lower-case letters, digits and dashes")
    if marked and not _INSTANCE_NAME.fullmatch(instance):
        raise ValueError(f"{instance!r} is no instance's name: lower-case letters, digits and dashes")
    authority = _read_pair(folder, AUTHORITY)
    if authority is None:
        raise FileNotFoundError(f"{folder} holds no valid authority; create_authority makes it")
    authority_certificate, authority_key = authority
    existing = _read_pair(folder, name)
    if existing is not None and _is_issued_by(existing[0], authority_certificate):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service_name)])
    builder = _builder(subject, authority_certificate.subject, key, SERVICE_VALID_DAYS)
    # The first one is whom a server takes the caller for.
    alternatives: list[x509.GeneralName] = [
        x509.DNSName(service_name),
        x509.DNSName("localhost"),
        x509.IPAddress(IPv4Address("127.0.0.1")),
    ]
    if instance:
        alternatives.append(x509.UniformResourceIdentifier(_spiffe_id(service_name, instance)))
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(both_ends, critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    _write_pair(folder, name, builder.sign(authority_key, hashes.SHA256()), key)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chassis.pki", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder of the certificates; made when missing")
    parser.add_argument("names", nargs="*", help="service names that get a certificate, or service@instance")
    options = parser.parse_args(arguments)
    create_authority(options.dir)
    for name in options.names:
        issue(options.dir, name)
    return 0


def _spiffe_id(service_name: str, instance: str) -> str:
    return f"spiffe://finemesh/{service_name}/{instance}"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid_days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=valid_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _read_pair(folder: Path, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
    """The pair when both files are there, belong together and stay valid for a while; otherwise None."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), password=None)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        return None
    if certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=RENEW_BEFORE_DAYS):
        return None
    return certificate, key


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _write_pair(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(folder / f"{name}.key", secret, 0o600)
    _write(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    # Made with its final mode and renamed, so that a key is never readable by others and never half there.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
