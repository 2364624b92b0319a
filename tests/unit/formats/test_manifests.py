"""A manifest lists exactly the files that are there, and a revision is the name of what they hold."""

import pytest

from formats.manifests import FileDigest, read_manifest, revision_of, write_manifest

FILES = [FileDigest(path=path, size_bytes=1, sha256=digest * 64) for path, digest in (("b/c", "1"), ("a", "2"))]


def test_a_manifest_reads_back() -> None:
    content = write_manifest({"step": 7}, FILES).encode()
    assert read_manifest(content, reversed(FILES))["step"] == 7
    assert write_manifest({"step": 7}, FILES).startswith('{\n "files": [')


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": 1}', b'{"files": [1]}', b'{"files": [], "files": []}']
)
def test_a_manifest_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="the manifest cannot be read"):
        read_manifest(content, [])


def test_files_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match="differ from the manifest: a, b/c"):
        read_manifest(write_manifest({}, FILES[:1]).encode(), FILES[1:])


def test_a_revision_is_that_of_paths_and_contents_in_any_order() -> None:
    assert revision_of(FILES) == revision_of(reversed(FILES)) == "rv_6921f896974d75e7dff5a9bd57540876"
    assert revision_of(FILES) != revision_of(FILES[:1])
