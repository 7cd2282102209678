"""Logged models under MLflow's scoring server, asked by HTTP's own rules in this process."""

import asyncio
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.pyfunc import scoring_server
from torch import nn

from tracklight.tracking.logged_model import log_model
from tracklight.tracking.mlflow_client import mlflow

WEIGHTS, BIAS = {"a": 2.0, "b": -3.0}, 0.5


def plane(dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(2, 1).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[*WEIGHTS.values()]]))
        layer.bias.fill_(BIAS)
    return layer


@pytest.fixture(scope="module")
def client(tmp_path_factory, template):
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(template, folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("here", (folder / "artifacts").as_uri())
    return client


def log(client, model, example, *more):
    experiment = client.get_experiment_by_name("here").experiment_id
    address = log_model(client, client.create_run(experiment).info.run_id, model, example, 0, *more)
    folder = client.get_logged_model(address.removeprefix("models:/")).artifact_location
    return mlflow.pyfunc.load_model(folder)


@pytest.fixture(scope="module")
def served(client):
    """The server of a table's model; maps a request to status and answer."""
    model = log(client, plane(), torch.randn(2, 2), "columns as they are", ["a", "b"], ["y"])
    return model, ask(scoring_server.init(model))


def ask(app):
    """Return what sends a body to an ASGI application, as a server would."""

    async def send(body: bytes) -> tuple[int, bytes]:
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def answer(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b""}
        headers = [(b"content-type", b"application/json")]
        await app(scope | {"headers": headers, "http_version": "1.1", "scheme": "http"}, receive, answer)
        return sent[0]["status"], b"".join(each.get("body", b"") for each in sent)

    def strict(text: str):
        raise AssertionError(f"{text} is no JSON")

    def asked(request) -> tuple[int, dict]:
        status, body = asyncio.run(send(json.dumps(request).encode()))
        return status, json.loads(body, parse_constant=strict)

    return asked


@pytest.mark.parametrize(
    "request_",
    [
        {"dataframe_records": [{"a": 1.0, "b": 0.25}, {"b": 4.0, "a": -2.0}]},
        {"dataframe_records": [{"b": 0.25, "a": 1}, {"b": 4, "a": -2}]},
        {"dataframe_split": {"columns": ["b", "a"], "data": [[0.25, 1.0], [4.0, -2.0]]}},
        {"inputs": {"b": [0.25, 4.0], "a": [1.0, -2.0]}},
    ],
)
def test_a_table_answers_by_the_names_of_columns_in_any_order(served, request_):
    # 2 a - 3 b + 0.5, exact in float32
    assert served[1](request_) == (200, {"predictions": [{"y": 1.75}, {"y": -15.5}]})


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"dataframe_records": [{"a": 1.0}]}, "'b'"),
        ({"dataframe_records": [{"a": 1.0, "b": 2.0, "c": 3.0}]}, "'c'"),
        ({"dataframe_records": [{"A": 1.0, "b": 2.0}]}, "'a'"),
        ({"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1.0, 2.0, 3.0]]}}, "'c'"),
        ({"inputs": [[1.0, 2.0]]}, "'a'"),
        ({"dataframe_records": [{"a": 1.0, "b": None}]}, "row 0"),
        ({"dataframe_records": [{"a": 1.0, "b": 1.0}, {"a": 1e39, "b": 2.0}]}, "row 1"),
        ({"dataframe_records": [{"a": 1.0, "b": "two"}]}, ""),
    ],
)
def test_a_missing_or_unknown_name_and_an_answer_that_is_no_number_are_http_400(served, request_, named):
    status, answer = served[1](request_)
    assert status == 400 and named in answer["message"]


def test_the_signature_names_columns_and_targets_and_says_what_is_taken(served):
    metadata = served[0].metadata
    assert metadata.get_input_schema().input_names() == ["a", "b"]
    assert metadata.get_output_schema().input_names() == ["y"]
    assert metadata.metadata["takes"] == "columns as they are"


def test_a_table_in_float64_keeps_its_digits(client):
    model = log(client, plane(torch.float64), torch.randn(2, 2).double(), "", ["a", "b"], ["y"])
    a, b = 1 + 2**-40, 2**-50
    answer = model.predict(pd.DataFrame({"b": [b], "a": [a]}))
    assert answer["y"].tolist() == [2 * a - 3 * b + 0.5]


def test_an_image_models_signature_says_shape_and_encoding(client):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    words = "pixel / 255, 0 to 1; the model does not normalise"
    model = log(client, net, torch.rand(2, 1, 4, 4), words)
    (spec,) = model.metadata.get_input_schema().inputs
    assert (spec.name, spec.shape) == (words, (-1, 1, 4, 4))
    images = torch.rand(3, 1, 4, 4)
    status, answer = ask(scoring_server.init(model))({"inputs": images.tolist()})
    expected = net(images).detach().numpy()
    assert status == 200 and np.array(answer["predictions"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exported_as_float32(client, dtype):
    model = log(client, plane(dtype), torch.randn(2, 2), "", ["a", "b"], ["y"])
    assert model.predict(pd.DataFrame({"a": [0.1], "b": [0.2]}))["y"][0] == pytest.approx(0.1, abs=1e-6)
