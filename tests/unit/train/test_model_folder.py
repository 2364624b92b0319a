"""What rendering and tokenising take from a model's folder, held against what transformers makes of the same files."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from formats.rows import Conversation, Message
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal
from services.trainer.train.settings.failures import Failure

NAMES = ("bos_token", "eos_token", "pad_token")
OTHER = {"bos_token": "<|user|>"}


@pytest.mark.parametrize("shape", [str, dict], ids=["text", "object"])
@pytest.mark.parametrize(
    ("config", "in_map"),
    [
        ({"keep": True}, {}),
        ({"keep": False}, {"all": True}),
        ({"keep": True}, OTHER),
        ({"keep": False, "added_tokens_decoder": {}}, {"all": True}),
        ({"keep": True, "added_tokens_decoder": {"2": {"content": "<|end|>", "special": True}}}, OTHER),
    ],
    ids=["config", "map", "both", "map-of-a-newer-config", "newer-config"],
)
def test_special_tokens_are_those_of_transformers(
    model_directory: Path, tmp_path: Path, config: dict[str, Any], in_map: dict[str, Any], shape: type
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    # Where no name tells the end of a sequence, its id does.
    architecture = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(architecture | {"eos_token_id": 2}))
    written = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {name: written[name] for name in NAMES if name in written}
    assert "bos_token" in tokens
    wanted = {**config}
    if not wanted.pop("keep"):
        written = {name: value for name, value in written.items() if name not in NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | wanted))
    listed = tokens if in_map.get("all") else in_map
    if listed:
        spelled = {name: text if shape is str else {"content": text, "lstrip": False} for name, text in listed.items()}
        (folder / "special_tokens_map.json").write_text(json.dumps(spelled))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = open_model_folder(folder).special_tokens
    assert {name: ours.get(name) for name in NAMES} == {name: getattr(theirs, name) for name in NAMES}


@pytest.mark.parametrize("in_file", [False, True])
def test_rows_with_tools_are_rendered_by_the_template_that_is_named_for_them(
    model_directory: Path, tmp_path: Path, in_file: bool
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    (folder / "chat_template.jinja").unlink()
    every = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}{% if add_generation_prompt "
        "%}[assistant]{% endif %}"
    )
    named = [{"name": "default", "template": every}, {"name": "tool_use", "template": "{{ tools | tojson }}" + every}]
    written = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(written | {"chat_template": named}))
    if in_file:
        (folder / "chat_template.jinja").write_text(every)
    opened, theirs = open_model_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    said = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    template = ChatTemplate.of(opened, date(2024, 7, 26))
    messages = [Message(role=entry["role"], content=entry["content"]) for entry in said]
    for tools in ([], [tool]):
        rendered = template.render(messages, add_generation_prompt=False, tools=tools)
        assert rendered == theirs.apply_chat_template(said, tools=tools or None, tokenize=False)
        assert ("add" in rendered) == (bool(tools) and not in_file)
    row = Conversation(line=1, messages=tuple(messages), tools=(tool,))
    if in_file:
        with pytest.raises(TemplateRefusal, match="takes tools"):
            template.trained_spans(row, train_on_inputs=False)
        return
    text, spans = template.trained_spans(row, train_on_inputs=False)
    assert [text[start:end] for start, end in spans] == ["3."]
    (folder / "tokenizer_config.json").write_text(json.dumps(written | {"chat_template": named[:1]}))
    assert open_model_folder(folder).template_sha256 != opened.template_sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"{{ messages }}\xff"),
        ("config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": "\xff"}'),
        ("special_tokens_map.json", b"[]"),
        ("config.json", b'{"vocab_size": "many"}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_file_that_cannot_be_read_is_the_models_fault(
    model_directory: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(Failure) as refused:
        open_model_folder(folder)
    assert (refused.value.kind, refused.value.reason) == ("user", "MODEL_INVALID")
