"""Images from outside are pinned to digests in deploy/.env. The registry is a script in the place of docker."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import compose_env, pin_images

DEPLOY = Path(compose_env.__file__).parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
FIRST, SECOND = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    target = tmp_path / ".env"
    assert compose_env.main(["--out", str(target)]) == 0
    return target


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A `docker` that notes what it is asked for and does `body`; returns the notes."""
    notes = folder / "asked"
    program = folder / "bin" / "docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >>{notes}\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return notes


def answer(digest: str) -> str:
    return f"""echo '{{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "{digest}", "size": 9}}'"""


def test_every_image_from_outside_can_be_named_and_is_the_examples_by_default() -> None:
    """What compose takes from elsewhere is a variable whose default is the tag that the example shows."""
    defaults = pin_images.images((DEPLOY / "env.example").read_text(), "")
    written = [service["image"] for service in COMPOSE["services"].values()]
    written += [
        service["build"]["args"]["PYTHON_IMAGE"] for service in COMPOSE["services"].values() if "build" in service
    ]
    outside = {image for image in written if not image.startswith("finemesh/")}
    assert outside == {f"${{{name}:-{image}}}" for name, image in defaults.items()}
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG PYTHON_IMAGE={defaults['FINEMESH_PYTHON_IMAGE']}\n" in dockerfile
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) <= {"${PYTHON_IMAGE}", *stages}


def test_digests_are_written_beside_their_tags_and_renewed(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = env_file.read_text()
    notes = answering(tmp_path, monkeypatch, answer(FIRST))
    assert pin_images.main(["--out", str(env_file)]) == 0
    first = env_file.read_text()
    assert first.startswith(before)
    assert f"\nFINEMESH_POSTGRES_IMAGE=postgres:18@{FIRST}\n" in first
    assert first.count(FIRST) == len(notes.read_text().splitlines()) == 3
    assert env_file.stat().st_mode & 0o077 == 0
    answering(tmp_path, monkeypatch, answer(SECOND))
    assert pin_images.main(["--out", str(env_file)]) == 0
    assert env_file.read_text() == first.replace(FIRST, SECOND)
    # The registry is asked for the tag, and not for the digest that is known.
    assert "@" not in notes.read_text()


def test_an_image_of_ones_own_registry_is_asked_for_there(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file.write_text(env_file.read_text() + "FINEMESH_NATS_IMAGE=images.example:5000/nats:2.12\nAFTER=1\n")
    notes = answering(tmp_path, monkeypatch, answer(FIRST))
    assert pin_images.main(["--out", str(env_file)]) == 0
    assert f"\nFINEMESH_NATS_IMAGE=images.example:5000/nats:2.12@{FIRST}\nAFTER=1\n" in env_file.read_text()
    assert " images.example:5000/nats:2.12\n" in notes.read_text()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'no such host' >&2; exit 1", "no such host"),
        ("echo '{}'", "docker answered '{}"),
        ("echo not-json", "docker answered 'not-json"),
        (answer("sha256:short"), "sha256:short"),
        (f'case "$*" in *nats*) exit 3;; *) {answer(FIRST)};; esac', "docker ended with 3"),
    ],
)
def test_without_an_answer_nothing_is_written(
    body: str,
    said: str,
    env_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = env_file.read_text()
    answering(tmp_path, monkeypatch, body)
    assert pin_images.main(["--out", str(env_file)]) == 1
    assert said in capsys.readouterr().err
    assert env_file.read_text() == before


def test_what_has_to_be_there_first_is_named(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pin_images.main(["--out", str(env_file)]) == 1
    assert "there is no docker command" in capsys.readouterr().err
    assert pin_images.main(["--out", str(tmp_path / "nothing")]) == 1
    assert "make compose-env" in capsys.readouterr().err
