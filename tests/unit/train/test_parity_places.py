"""Where an export is read back: on the run's device, or in the machine's memory where one device cannot take all of
it."""

from collections.abc import Callable

import pytest
import torch

from services.trainer.train.export.parity import where_it_fits


def room_on(*places: str) -> Callable[[str], str]:
    def score(device: str) -> str:
        if device not in places:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return f"scored on {device}"

    return score


def test_the_device_comes_first() -> None:
    assert where_it_fits(room_on("cuda:0", "cpu"), "cuda:0") == ("scored on cuda:0", "cuda:0")


def test_what_no_device_takes_is_read_into_the_machines_memory() -> None:
    assert where_it_fits(room_on("cpu"), "cuda:0") == ("scored on cpu", "cpu")


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_where_nothing_takes_it_that_is_said(device: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        where_it_fits(room_on(), device)


def test_another_error_is_not_taken_for_a_want_of_room() -> None:
    def broken(_device: str) -> str:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        where_it_fits(broken, "cuda:0")
