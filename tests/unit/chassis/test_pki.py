"""Certificates: made once, kept while valid, made anew when not; keys readable by their owner only."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from chassis import pki


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_running_it_again_changes_nothing(tmp_path: Path) -> None:
    assert pki.main(["--dir", str(tmp_path / "tls"), "oven", "shop"]) == 0
    first = files(tmp_path / "tls")
    assert set(first) == {"ca.pem", "ca.key", "oven.pem", "oven.key", "shop.pem", "shop.key"}
    assert pki.main(["--dir", str(tmp_path / "tls"), "oven", "shop", "bank"]) == 0
    second = files(tmp_path / "tls")
    assert {name: second[name] for name in first} == first
    assert "bank.pem" in second


def test_what_a_certificate_says(tmp_path: Path) -> None:
    pki.main(["--dir", str(tmp_path), "oven"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "oven.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["oven", "localhost"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc < datetime.now(UTC) < certificate.not_valid_after_utc
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes()))
    for key in tmp_path.glob("*.key"):
        assert key.stat().st_mode & 0o777 == 0o600


def test_a_certificate_of_another_authority_or_about_to_expire_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki.main(["--dir", str(tmp_path), "oven"])
    old = files(tmp_path)
    (tmp_path / "ca.key").unlink()
    pki.main(["--dir", str(tmp_path), "oven"])
    new = files(tmp_path)
    assert new["ca.pem"] != old["ca.pem"]
    assert new["oven.pem"] != old["oven.pem"]
    monkeypatch.setattr(pki, "BACKDATE", timedelta(days=1))
    monkeypatch.setattr(pki, "SERVICE_VALID_DAYS", pki.RENEW_BEFORE_DAYS - 1)
    (tmp_path / "oven.pem").unlink()
    pki.main(["--dir", str(tmp_path), "oven"])
    short_lived = files(tmp_path)
    pki.main(["--dir", str(tmp_path), "oven"])
    assert files(tmp_path)["oven.pem"] != short_lived["oven.pem"]


@pytest.mark.parametrize("name", ["ca", "../oven", "Oven", "", "a/b"])
def test_a_name_that_is_no_service_name_is_refused(tmp_path: Path, name: str) -> None:
    pki.create_authority(tmp_path)
    with pytest.raises(ValueError, match="no service name"):
        pki.issue(tmp_path, name)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m chassis\.pki"):
        pki.load(tmp_path, "oven")


def test_one_process_of_a_service_is_told_from_the_others(tmp_path: Path) -> None:
    pki.main(["--dir", str(tmp_path), "oven", "oven@hall-2"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "oven@hall-2.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["oven", "localhost"]
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["spiffe://finemesh/oven/hall-2"]
    assert pki.instance_of("oven", ["oven", *uris]) == "hall-2"
    assert pki.instance_of("shop", ["shop", *uris]) == ""
    for name in ("oven@", "oven@../x", "oven@a@b", "oven@A"):
        with pytest.raises(ValueError, match="no instance"):
            pki.issue(tmp_path, name)
