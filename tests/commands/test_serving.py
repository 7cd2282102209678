"""The model that a run logged, under MLflow's own server, and in its registry."""

import json
import urllib.request

import numpy as np
import pytest
import torch

from tracklight.runs import select as query
from tracklight.tracking.tags import BEST
from ui_server import mlflow

pytestmark = [pytest.mark.server, pytest.mark.slow]


def model_id(kept, run_id):
    run = query.select_run(kept.store, run_id)
    (logged,) = kept.store.client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    return logged.model_id


def test_registered_model_answers_a_request_under_mlflow_models_serve(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", kept.store.uri)  # the registry asks by this name
    client = kept.store.client
    client.create_registered_model("digits")
    source = f"models:/{model_id(kept, kept.mlp)}"
    version = client.create_model_version("digits", source, kept.mlp)
    client.set_registered_model_alias("digits", "champion", version.version)

    images = np.random.default_rng(0).normal(size=(3, 1, 28, 28)).astype(np.float32)
    weights = torch.load(
        query.fetch(kept.store, query.select_run(kept.store, kept.mlp), BEST), weights_only=True
    )["state_dict"]
    hidden = torch.from_numpy(images).flatten(1) @ weights["layers.1.weight"].T
    hidden = (hidden + weights["layers.1.bias"]).relu()
    expected = hidden @ weights["layers.3.weight"].T + weights["layers.3.bias"]

    command = ("models", "serve", "-m", "models:/digits@champion", "--env-manager", "local")
    with mlflow(*command, health="/ping", log=tmp_path / "log", MLFLOW_TRACKING_URI=kept.store.uri) as uri:
        request = urllib.request.Request(
            f"{uri}/invocations",
            json.dumps({"inputs": images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)["predictions"]
    assert np.array(answer) == pytest.approx(expected.numpy(), abs=1e-4)
