"""`finemesh files preview` and the features of a file, against a server that answers from memory."""

import json

import pytest
from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from finemesh.files.v1 import dataset_preview_pb2, file_pb2, file_service_pb2, file_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from finemesh_client.cli.main import app
from tests.unit.client.conftest import Serve

NAME = "projects/acme/files/file-1"
ROW = dataset_preview_pb2.PreviewRow(
    line=7,
    part="preferred",
    input_ids=[1, 2, 3],
    labels=[-100, 2, 3],
    tokens=["<s>", "[red]", "ok"],
    trained_spans=[dataset_preview_pb2.TrainedSpan(start=1, end=3)],
    token_count=5,
    trained_token_count=4,
    truncated_token_count=9,
    truncated_text=" lost",
    weight=0.5,
)


class Mesh(tuning_service_pb2_grpc.TuningServiceServicer, file_service_pb2_grpc.FileServiceServicer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuning_service_pb2.PreviewDatasetRequest] = []

    def PreviewDataset(
        self, request: tuning_service_pb2.PreviewDatasetRequest, context: object
    ) -> tuning_service_pb2.PreviewDatasetResponse:
        self.asked.append(request)
        preview = dataset_preview_pb2.DatasetPreview(
            format=file_pb2.DATASET_FORMAT_PREFERENCE,
            features=file_pb2.DatasetFeatures(tools=True, parallel_tool_calls=True),
            row_count=11,
            sequence_tokens_max=256,
            train_on_inputs="auto",
            rows=[ROW],
        )
        return tuning_service_pb2.PreviewDatasetResponse(preview=preview)

    def GetFile(self, request: Message, context: object) -> file_service_pb2.GetFileResponse:
        features = file_pb2.DatasetFeatures(reasoning=True)
        return file_service_pb2.GetFileResponse(file=file_pb2.File(name=NAME, features=features))


@pytest.fixture
def mesh(serve: Serve) -> Mesh:
    mesh = Mesh()
    serve(
        mesh,
        tuning_service_pb2_grpc.add_TuningServiceServicer_to_server,
        file_service_pb2_grpc.add_FileServiceServicer_to_server,
    )
    return mesh


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["files", *arguments])


def test_rows_are_shown_with_what_is_trained_and_what_is_cut(mesh: Mesh) -> None:
    shown = run("preview", NAME, "--model", "finemesh/demo", "--rows", "3", "--max-tokens", "256")
    assert shown.exit_code == 0, shown.output
    asked = tuning_service_pb2.PreviewDatasetRequest(
        file=NAME,
        base_model="finemesh/demo",
        row_count_max=3,
        sequence_tokens_max=256,
        train_on_inputs=tuning_job_pb2.TRAIN_ON_INPUTS_AUTO,
    )
    assert mesh.asked == [asked]
    assert "tools, parallel tool calls" in shown.output
    assert "line 7, preferred: 5 tokens, 4 trained, 9 cut off, weight 0.5" in shown.output
    # Text of a dataset is never taken for mark-up.
    assert "<s>[red]ok ... 2 more tokens lost" in shown.output


def test_json_is_the_message(mesh: Mesh) -> None:
    shown = run("preview", NAME, "-m", "finemesh/demo", "--json")
    document = json.loads(shown.output)
    assert document["rows"][0]["labels"] == [-100, 2, 3]
    assert document["features"]["tools"] is True


def test_an_unknown_way_of_training_inputs_is_refused_here(mesh: Mesh) -> None:
    assert run("preview", NAME, "-m", "x", "--train-on-inputs", "maybe").exit_code == 2
    assert mesh.asked == []


def test_a_file_says_what_it_uses(mesh: Mesh) -> None:
    assert "reasoning" in run("get", NAME).output
