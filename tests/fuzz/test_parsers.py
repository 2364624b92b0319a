"""Every parser of foreign bytes: what cannot be read is refused by the parser's own error, in words for its author."""

import gzip
import io
import json
import struct
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.bus.envelope import stored_envelope
from chassis.errors import DomainError, InvalidArgument
from chassis.paging import Pages
from chassis.storable import unstorable_in_json
from finemesh_client.errors import InvalidRequest
from finemesh_client.hub_download import HubFile, chosen
from formats.manifests import FileDigest, read_manifest
from formats.parquet import TokenRows
from formats.row_errors import RowErrors
from formats.strict_json import json_value
from formats.work import TooMuchWork
from services.billing.archive.archive_format import ArchivedEvent, ArchiveUnreadable, pack, unpack
from services.billing.prices.parse import read_book
from services.billing.prices.yaml import BookInvalid
from services.gateway.files.check_program import check_tokens
from services.gateway.files.dataset_report import DatasetLimits
from services.gateway.files.line_check import LineCheck
from services.gateway.files.plain_lines import PlainLines
from services.gateway.http.chat_request import read_chat
from services.inference.engines.adapters.adapter_check import check_adapter
from services.inference.engines.adapters.safetensors_file import FileProblem, check_finite, read_header
from services.inference.engines.base import AdapterInvalid, EngineFailed, EngineSettings
from services.inference.engines.model_files import cache_bytes_per_token, context_tokens, read_config
from services.inference.models.model_facts import read_facts
from services.trainer.train.analysis.request import parse_request, read_question
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec_json import parse_spec
from tests.fuzz.documents import changed_json, damaged
from tests.fuzz.messages import TEXTS
from tests.fuzz.outcome import judge_text
from tests.fuzz.run import fuzzed

LIMITS = DatasetLimits(
    line_bytes_max=10_000,
    lines_max=50,
    messages_max=5,
    errors_max=20,
    cells_max=10_000,
    expanded_bytes_max=10_000_000,
)
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {
        "messages": [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "ok", "weight": 1, "reasoning_content": "hm"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "weight": 0.5,
    },
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "completion": "b", "label": True},
    {"text": "abc"},
    {
        "input": {"messages": [{"role": "user", "content": "q"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    },
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 512,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "eos_token_id": 0,
    "text_config": None,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 0,
            "content": "</s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "</s>"},
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "bos_token": {"content": "</s>"},
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
HEADER = {"w.lora_A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"a": "b"}}
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
SPEC = {
    "job_id": "ft-1",
    "attempt": 1,
    "base_model": {"directory": "/base", "id": "a/b", "revision": "rv_1"},
    "training": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
    "training_file": "train.jsonl",
    "validation_file": None,
    "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.01, "seed": 1},
    "method": {"type": "supervised"},
}
MANIFEST = {"step": 1, "files": [{"path": "a", "size_bytes": 1, "sha256": "0" * 64}]}
BOOK = (Path(__file__).parents[2] / "services/billing/prices/books/default-2026-3.yaml").read_bytes()
EVENT = ArchivedEvent(
    stream="usage",
    sequence=1,
    time=datetime(2030, 1, 1, tzinfo=UTC),
    subject="usage.tokens",
    headers={"ce-id": str(uuid.UUID(int=1)), "ce-type": "a"},
    payload=b"abc",
)


def refused_by(*kinds: type[BaseException]) -> Any:
    """The block may raise these, with words for the author of what was read; anything else is a defect."""

    class Block:
        def __enter__(self) -> None: ...

        def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
            if error is None or not isinstance(error, kinds):
                return False
            judge_text(getattr(error, "message", "") or str(error), "")
            return True

    return Block()


@fuzzed(15)
@given(lines=st.lists(st.sampled_from(ROWS).flatmap(changed_json), min_size=1, max_size=6), cut=st.integers(1, 100))
def test_dataset_lines(lines: list[bytes], cut: int) -> None:
    content = b"\n".join([json.dumps(ROWS[0]).encode(), *lines])
    reports = []
    for see in (None, PlainLines):
        check = LineCheck(LIMITS, see)
        with refused_by(TooMuchWork):
            for start in range(0, len(content), cut):
                check.feed(content[start : start + cut])
            reports.append(check.finish())
    # Lines that are seen at once are seen as they are one by one.
    assert reports[1:] == reports[:-1]
    for error in reports[0].errors:
        judge_text(f"{error.path} {error.expectation}", content)


def parquet() -> bytes:
    table = pa.table({"input_ids": [[1, 2, 3], [4]], "labels": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


@fuzzed(15)
@given(content=damaged(parquet()))
def test_parquet_files(content: bytes) -> None:
    errors = RowErrors(kept_max=20)
    count, _, excess = check_tokens(io.BytesIO(content), LIMITS.work(), errors)
    assert count or errors.count or excess
    if not errors.count and excess is None:
        assert len(list(TokenRows(io.BytesIO(content), errors, LIMITS.work()))) == count


@fuzzed(15)
@given(content=st.one_of(st.sampled_from(ROWS).flatmap(changed_json), st.binary(max_size=40)))
def test_json_and_its_texts(content: bytes) -> None:
    with refused_by(ValueError):
        unstorable_in_json(json_value(content))
    with refused_by(InvalidArgument):
        read_chat(content, messages_max=5)


@fuzzed(10)
@given(content=changed_json(MANIFEST))
def test_manifests(content: bytes) -> None:
    with refused_by(ValueError):
        read_manifest(content, [FileDigest(path="a", size_bytes=1, sha256="0" * 64)])


@fuzzed(15)
@given(
    header=changed_json(HEADER),
    data=st.sampled_from([bytes(16), b"", b"\xff" * 16, bytes(17)]),
    size=st.integers(-1, 1),
)
def test_safetensors_headers(header: bytes, data: bytes, size: int) -> None:
    content = struct.pack("<Q", max(0, len(header) + size)) + header + data
    with refused_by(FileProblem):
        check_finite(io.BytesIO(content), read_header(io.BytesIO(content), len(content)))


@fuzzed(5)
@given(config=changed_json(ADAPTER), header=changed_json(HEADER), base=changed_json(CONFIG))
def test_adapters(tmp_path_factory: pytest.TempPathFactory, config: bytes, header: bytes, base: bytes) -> None:
    folder = _folder(tmp_path_factory, {"adapter_config.json": config})
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_bytes(base)
    limits = EngineSettings()
    with refused_by(AdapterInvalid, EngineFailed):
        check_adapter("rv_1", folder, 4, read_config(folder / "base"), limits)


@fuzzed(10)
@given(config=changed_json(CONFIG))
def test_configs_of_engines(tmp_path_factory: pytest.TempPathFactory, config: bytes) -> None:
    folder = _folder(tmp_path_factory, {"config.json": config})
    with refused_by(EngineFailed):
        found = read_config(folder)
        context_tokens(found, EngineSettings())
        cache_bytes_per_token(found)


@fuzzed(10)
@given(config=changed_json(CONFIG), header=changed_json(HEADER), generation=changed_json({"eos_token_id": [1, 2]}))
def test_facts_of_imported_models(
    tmp_path_factory: pytest.TempPathFactory, config: bytes, header: bytes, generation: bytes
) -> None:
    weights = struct.pack("<Q", len(header)) + header + bytes(16)
    contents = {"config.json": config, "tokenizer.json": b"{}", "model.safetensors": weights}
    contents["generation_config.json"] = generation
    folder = _folder(tmp_path_factory, contents)
    files = [FileDigest(path=name, size_bytes=len(content), sha256="") for name, content in contents.items()]
    with refused_by(DomainError):
        read_facts(folder, files)


@fuzzed(5)
@given(
    config=changed_json(CONFIG),
    tokenizer=changed_json(TOKENIZER),
    described=changed_json(TOKENIZER_CONFIG),
    which=st.integers(0, 2),
)
def test_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, config: bytes, tokenizer: bytes, described: bytes, which: int
) -> None:
    contents = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "tokenizer_config.json": TOKENIZER_CONFIG}
    good = {name: json.dumps(document).encode() for name, document in contents.items()}
    changed = dict(zip(contents, (config, tokenizer, described), strict=True))
    name = list(contents)[which]
    folder = _folder(tmp_path_factory, {**good, name: changed[name]})
    with refused_by(Failure):
        open_model_folder(folder)


@fuzzed(10)
@given(content=changed_json(SPEC))
def test_specs_and_questions(content: bytes) -> None:
    with refused_by(Failure):
        document = parse_request(content)
        with refused_by(Failure):
            read_question(document)
        parse_spec(document)


@fuzzed(5)
@given(content=damaged(BOOK))
def test_price_books(content: bytes) -> None:
    with refused_by(BookInvalid):
        read_book(content.decode("utf-8", errors="replace"), "book.yaml")


@fuzzed(15)
@given(
    packed=damaged(pack([EVENT], position=1, previous_sha256=bytes(32)).content),
    lines=st.lists(changed_json({"stream": "a", "sequence": 1, "time": "2030-01-01T00:00:00Z", "subject": "a",
                                 "headers": {"ce-id": "a"}, "payload": "YQ=="}), max_size=2),
)  # fmt: skip
def test_archives(packed: bytes, lines: list[bytes]) -> None:
    header = json.dumps({"format": "finemesh.usage-archive.v1", "position": 1, "previous_sha256": "", "stream": "a",
                         "event_count": len(lines), "first_time": "", "last_time": ""}).encode()  # fmt: skip
    for content in (packed, gzip.compress(b"\n".join([header, *lines, b""]))):
        with refused_by(ArchiveUnreadable):
            _, events = unpack(content, unpacked_bytes_max=10_000)
            assert all(event.id is None or event.id for event in events)
            assert all(isinstance(event.type, str) for event in events)


@fuzzed(10)
@given(
    names=st.lists(
        st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
        | TEXTS
    )
)
def test_files_of_a_hub(names: list[str]) -> None:
    with refused_by(InvalidRequest):
        chosen("a/b", [HubFile(name=name, size_bytes=1) for name in names])


@fuzzed(10)
@given(headers=st.dictionaries(st.sampled_from(["ce-id", "ce-time", "ce-type", "ce-source", "traceparent"]), TEXTS))
def test_headers_of_events(headers: dict[str, str]) -> None:
    stored_envelope(uuid.UUID(int=1), headers, datetime(2030, 1, 1, tzinfo=UTC))


@fuzzed(10)
@given(token=TEXTS | st.binary(max_size=60).map(lambda content: content.decode("latin-1")))
def test_page_tokens(token: str) -> None:
    with refused_by(InvalidArgument):
        Pages("").decode(token, scope="a", kinds=(int, str))


def _folder(factory: pytest.TempPathFactory, contents: dict[str, bytes]) -> Path:
    """A folder that holds these; the same for all examples of a session."""
    folder = factory.getbasetemp() / "parsed"
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder
