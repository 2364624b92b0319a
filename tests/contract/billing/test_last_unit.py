"""The last unit of a balance: 200 calls at once each hold 1 of 100 through the real service,
and 100 of them succeed."""

import asyncio
from pathlib import Path

import pytest

from chassis.errors import DomainError
from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.holds.v1.hold_service_pb2 import CreateHoldResponse, ReleaseHoldRequest
from tests.contract.billing.conftest import Customer, Mesh

# A million tokens cost a thousandth of a dollar, so a token costs the smallest amount that there is.
BOOK = """\
book: default
version: by-the-nano
effective_from: 2026-01-01
currency: USD
tuning:
  terms:
    - {description: Training tokens, tokens: training_tokens, times: [epochs]}
  base_fee_usd: 0
  minimum_usd: 0
  rates:
    - {model: "*", usd_per_million_tokens: {sft_lora: 0.001}}
"""


@pytest.fixture(scope="module")
def price_books_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    (folder / "by-the-nano.yaml").write_text(BOOK)
    return folder


async def hold(customer: Customer, number: int) -> CreateHoldResponse | DomainError:
    try:
        return await customer.hold(number, training_tokens=1, validation_tokens=0, epochs=1, evaluations=0)
    except DomainError as refusal:
        return refusal


async def balance(customer: Customer) -> tuple[int, int]:
    with customer.calling():
        found = (await customer.mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
    return found.available_nanos_usd, found.held_nanos_usd


async def test_200_holds_of_1_on_a_balance_of_100(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(100)
    answers = await asyncio.gather(*(hold(customer, number) for number in range(200)))
    held = [answer for answer in answers if isinstance(answer, CreateHoldResponse)]
    refused = [answer for answer in answers if isinstance(answer, DomainError)]
    assert (len(held), len(refused)) == (100, 100)
    assert {answer.quote.total_nanos_usd for answer in held} == {1}
    assert len({answer.hold_id for answer in held}) == 100
    for refusal in refused:
        assert refusal.reason == "BALANCE_INSUFFICIENT"
        assert refusal.metadata["available_nanos_usd"] == "0"
        assert refusal.metadata["shortfall_nanos_usd"] == "1"
    assert await balance(customer) == (0, 100)


async def test_a_unit_that_is_given_back_is_held_by_one_of_many(customer: Customer, mesh: Mesh) -> None:
    await customer.pay_in(1)
    assert isinstance(await hold(customer, 0), CreateHoldResponse)
    release = mesh.holds.ReleaseHold(ReleaseHoldRequest(resource=customer.job(0)))
    rest = await asyncio.gather(release, *(hold(customer, number) for number in range(1, 40)))
    winners = sum(isinstance(answer, CreateHoldResponse) for answer in rest)
    # Whoever asked before the release was refused truly; of those after it one is served.
    assert winners == (0 if (await balance(customer)) == (1, 0) else 1)
    assert sum(await balance(customer)) == 1
    again = [await hold(customer, 100 + number) for number in range(2)]
    assert sum(isinstance(answer, CreateHoldResponse) for answer in again) == 1 - winners
