"""The calculator to the cent: through the RPC, and through the command line, a real gateway and the real billing."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.holds.v1.hold_service_pb2 import QuoteWorkRequest
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from tests.contract.billing.conftest import Customer, Mesh, job_price
from tests.contract.gateway.world import World, gateway_world
from tests.harness.servers import PostgresServer

USD = 10**9
M = 10**6
EXAMPLE: dict[str, Any] = {
    "base_model": "meta-llama/Llama-3.1-8B",
    "training_tokens": 10 * M,
    "validation_tokens": M,
    "epochs": 3,
    "evaluations": 10,
}
# 60 million tokens by the default book, 40 by the other one, which bills evaluations once per job.
EXAMPLES = [
    ("sft_lora", "", "366.00", (30 * M, 30 * M), "6.10"),
    ("sft_full", "", "408.00", (30 * M, 30 * M), "6.80"),
    ("dpo_lora", "", "915.00", (30 * M, 30 * M), "15.25"),
    ("dpo_full", "", "1020.00", (30 * M, 30 * M), "17.00"),
    ("sft_lora", "default-2026-1", "366.00", (30 * M, 30 * M), "6.10"),
    ("sft_lora", "together-2026", "19.20", (30 * M, 10 * M), "0.48"),
    ("dpo_lora", "together-2026", "48.00", (30 * M, 10 * M), "1.20"),
    ("dpo_full", "together-2026", "54.00", (30 * M, 10 * M), "1.35"),
]


def nanos(dollars: str) -> int:
    whole, cents = dollars.split(".")
    return int(whole + cents) * USD // 100


@pytest.mark.parametrize(("kind", "version", "total", "quantities", "rate"), EXAMPLES)
async def test_worked_examples_by_rpc(
    customer: Customer, mesh: Mesh, kind: str, version: str, total: str, quantities: tuple[int, ...], rate: str
) -> None:
    request = job_price(
        **EXAMPLE, training_kind=pb.TrainingKind.Value(f"TRAINING_KIND_{kind.upper()}"), price_book_version=version
    )
    with customer.calling():
        price = await mesh.billing.EstimatePrice(request)
    assert price.total_nanos_usd == nanos(total)
    assert (price.total.units, price.total.nanos // (USD // 100)) == tuple(map(int, total.split(".")))
    assert price.price_book_version == (version or "default-2026-2")
    assert not price.minimum_applied
    assert [term.quantity for term in price.terms] == list(quantities)
    for term in price.terms:
        assert term.nanos_usd_per_million == nanos(rate)
        assert term.amount_nanos_usd == term.quantity // M * term.nanos_usd_per_million
    assert sum(term.amount_nanos_usd for term in price.terms) == price.total_nanos_usd


async def test_a_small_job_shows_what_lifts_it_to_the_minimum(customer: Customer, mesh: Mesh) -> None:
    with customer.calling():
        price = await mesh.billing.EstimatePrice(job_price())
    assert (price.total_nanos_usd, price.minimum_applied) == (5 * USD, True)
    assert sum(term.amount_nanos_usd for term in price.terms) == 5 * USD
    assert price.terms[-1].nanos_usd_per_million == 0


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    world: World
    mesh: Mesh

    async def run(self, *arguments: str, exit_code: int = 0) -> str:
        """stdout of `finemesh billing estimate ...`; stderr where it fails."""
        environment = {
            **os.environ,
            "FINEMESH_ADDRESS": f"127.0.0.1:{self.world.public_port}",
            "FINEMESH_API_KEY": self.world.acme.secret,
            "COLUMNS": "120",
        }
        code = "from finemesh_client.cli.main import app; app()"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, "billing", "estimate", *arguments),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
        assert process.returncode == exit_code, error.decode()
        return out.decode() if exit_code == 0 else error.decode()

    async def count_dataset(self, spec: tuning_job_pb2.TuningSpec, **counts: int) -> None:
        """From now on a dataset is counted so, and quoted as the scheduler does: by billing itself."""
        answer = await self.mesh.holds.QuoteWork(
            QuoteWorkRequest(
                organization_id=self.world.acme.organization_id,
                price=job_price(
                    base_model=spec.base_model,
                    epochs=spec.hyperparameters.epochs,
                    evaluations=spec.hyperparameters.evaluations,
                    training_tokens=counts["training_tokens"],
                    validation_tokens=counts["validation_tokens"],
                    parameter_count=8_030_261_248,
                ),
            )
        )
        self.world.tuning.quote = tuning_service_pb2.QuoteTuningJobResponse(
            counts=tuning_job_pb2.DatasetCounts(**counts),
            total_nanos_usd=answer.quote.total_nanos_usd,
            price_book_version=answer.quote.price_book_version,
            terms=[
                tuning_service_pb2.QuoteTerm(
                    description=term.description,
                    quantity=term.quantity,
                    nanos_usd_per_million=term.nanos_usd_per_million,
                    amount_nanos_usd=term.amount_nanos_usd,
                )
                for term in answer.quote.terms
            ],
            available_nanos_usd=answer.available_nanos_usd,
            spec=spec,
            minimum_applied=answer.quote.minimum_applied,
            parameter_count=8_030_261_248,
        )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cli(
    mesh: Mesh, postgres: PostgresServer, tls_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[CommandLine]:
    assert mesh.settings.port_file is not None
    billing_address = f"127.0.0.1:{mesh.settings.port_file.read_text().strip()}"
    folder = tmp_path_factory.mktemp("gateway")
    async with (
        postgres.scratch() as url,
        gateway_world(url, tls_dir, folder, billing_address=billing_address) as world,
    ):
        yield CommandLine(world=world, mesh=mesh)


def options(**changes: object) -> list[str]:
    numbers = {
        "--model": "meta-llama/Llama-3.1-8B",
        "--training-tokens": 10 * M,
        "--validation-tokens": M,
        "--epochs": 3,
        "--evaluations": 10,
        **{f"--{name.replace('_', '-')}": value for name, value in changes.items()},
    }
    return [str(part) for option in numbers.items() for part in option if part is not None]


def rows(shown: str) -> list[list[str]]:
    """The cells of a table."""
    return [re.split(r"\s*│\s*", line.strip()) for line in shown.splitlines() if "│" in line]


@pytest.mark.parametrize(
    ("version", "total", "evaluated"),
    [
        ("", "$366.00", ["Validation tokens", "30,000,000", "$6.10 / M", "$183.00"]),
        ("together-2026", "$19.20", ["Validation tokens", "10,000,000", "$0.48 / M", "$4.80"]),
    ],
)
async def test_worked_examples_by_command_line(
    cli: CommandLine, version: str, total: str, evaluated: list[str]
) -> None:
    shown = await cli.run(*options(**({"price_book": version} if version else {})))
    assert f"estimate (price book {version or 'default-2026-2'})" in shown
    assert evaluated in rows(shown)
    assert f"total {total}\n" in shown
    assert "minimum" not in shown


async def test_preference_tuning_by_command_line(cli: CommandLine) -> None:
    assert "total $915.00\n" in await cli.run(*options(method="dpo"))
    assert "total $54.00\n" in await cli.run(*options(method="dpo", price_book="together-2026"), "--full")


async def test_the_minimum_is_said(cli: CommandLine) -> None:
    shown = await cli.run("-m", "finemesh/demo-llama", "--training-tokens", "1000")
    assert ["Training tokens", "1,000", "$0.50 / M", "$0.0005"] in rows(shown)
    assert ["Up to the minimum per completed job", "", "", "$4.9995"] in rows(shown)
    assert "total $5.00 (the minimum)\n" in shown


async def test_json_is_the_contracts(cli: CommandLine) -> None:
    price = json.loads(await cli.run(*options(), "--json"))
    assert (price["total_nanos_usd"], price["price_book_version"]) == (str(366 * USD), "default-2026-2")
    assert [term["quantity"] for term in price["terms"]] == [str(30 * M)] * 2


async def test_a_real_dataset_by_any_book(cli: CommandLine) -> None:
    spec = tuning_job_pb2.TuningSpec(
        base_model="meta-llama/Llama-3.1-8B", hyperparameters=tuning_job_pb2.Hyperparameters(epochs=3, evaluations=10)
    )
    spec.lora.SetInParent()
    await cli.count_dataset(
        spec, training_examples=20_000, training_tokens=10 * M, validation_examples=2_000, validation_tokens=M
    )
    project = f"projects/{cli.world.acme.project_id}"
    files = ("--file", f"{project}/files/file_1", "--validation-file", f"{project}/files/file_2")
    asked = ("-m", spec.base_model, *files, "--epochs", "3", "--evaluations", "10", "--max-tokens", "2048")
    shown = await cli.run(*asked)
    wanted = cli.world.tuning.quoted
    assert (wanted.training_file, wanted.validation_file) == (files[1], files[3])
    assert (wanted.hyperparameters.epochs, wanted.hyperparameters.sequence_tokens_max) == (3, 2048)
    assert "20,000 examples, 10,000,000 tokens per epoch; 2,000 held out (1,000,000 tokens)" in shown
    assert ["Training tokens", "30,000,000", "$6.10 / M", "$183.00"] in rows(shown)
    assert "total $366.00\n" in shown
    assert "total $19.20\n" in await cli.run(*asked, "--price-book", "together-2026")
    elsewhere = json.loads(await cli.run(*asked, "--price-book", "together-2026", "--json"))
    assert (elsewhere["total_nanos_usd"], elsewhere["counts"]["training_tokens"]) == ("19200000000", str(10 * M))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-m", "m"), "give --training-tokens"),
        (("-m", "m", "--training-tokens", "0"), "--training-tokens"),
        (("-m", "m", "--training-tokens", "1", "--validation-file", "f"), "--validation-file belongs to --file"),
        (("-m", "m", "--file", "f", "--training-tokens", "1"), "--training-tokens is counted from --file"),
    ],
)
async def test_options_that_contradict_each_other(cli: CommandLine, arguments: tuple[str, ...], told: str) -> None:
    assert told in re.sub(r"[\s│]+", " ", await cli.run(*arguments, exit_code=2))


async def test_what_has_no_price_fails_and_says_so(cli: CommandLine) -> None:
    refused = await cli.run("-m", "nobody/nothing", "--training-tokens", "1", exit_code=1)
    assert "a parameter_count finds a price by size" in refused
    await cli.run("-m", "nobody/nothing", "--training-tokens", "1", "--parameters", str(7 * 10**9))
    refused = await cli.run(*options(price_book="free"), exit_code=1)
    assert "known are default-2026-1, default-2026-2, together-2026" in refused
    for version in ("", "together-2026"):
        refused = await cli.run(*options(price_book=version), "--method", "kto", exit_code=1)
        told = f"{version or 'default-2026-2'} has no price to tune 'meta-llama/Llama-3.1-8B' with kto_lora"
        assert told in re.sub(r"[\s│]+", " ", refused)
