"""What a child is told of the machine, and that work folders stay where they are."""

from pathlib import Path

import pytest

from services.trainer.child.child_environment import child_environment
from services.trainer.node.work_folders import NodeFolder


def test_a_child_gets_no_address_and_no_credential() -> None:
    environment = {
        "PATH": "/bin",
        "HOME": "/root",
        "LC_ALL": "C",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "FINEMESH_NATS_URL": "nats://secret@host",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "CUDA_VISIBLE_DEVICES": "0,1,2",
    }
    told = child_environment(environment, threads=3, gpu_uuid="GPU-a")
    assert "secret" not in str(told)
    assert told["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert told["OMP_NUM_THREADS"] == "3"
    assert (told["PATH"], told["LC_ALL"], told["HF_HUB_OFFLINE"]) == ("/bin", "C", "1")
    assert child_environment(environment, threads=1, gpu_uuid="")["CUDA_VISIBLE_DEVICES"] == ""


def test_an_agent_clears_what_was_left_and_keeps_others_out(tmp_path: Path) -> None:
    first = NodeFolder(tmp_path, "local-0").open()
    left = first.create("ft-1", "7")
    with pytest.raises(RuntimeError, match="another agent"):
        NodeFolder(tmp_path, "local-0").open()
    assert left.exists()
    first.close()
    second = NodeFolder(tmp_path, "local-0").open()
    assert not left.exists()
    other = NodeFolder(tmp_path, "local-1").open()
    second.close()
    other.close()


@pytest.mark.parametrize("part", ["", "..", "a/b", "../x", "a.b", "x" * 200])
def test_a_folder_name_cannot_lead_elsewhere(tmp_path: Path, part: str) -> None:
    folder = NodeFolder(tmp_path, "local-0").open()
    with pytest.raises(ValueError, match="folder"):
        folder.create(part, "7")
    folder.close()
