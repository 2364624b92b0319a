from pathlib import Path

import pytest

from chassis import pki


@pytest.fixture(scope="session")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    assert pki.main(["--dir", str(folder), "front", "middle", "back", "stranger"]) == 0
    return folder
