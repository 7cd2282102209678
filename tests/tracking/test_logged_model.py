"""The logged model predicts what the trained one does, wherever and however it is loaded."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from tracklight.tracking.logged_model import log_model
from tracklight.tracking.mlflow_client import mlflow


class Net(LightningModule):
    """Behaves otherwise while it is trained (dropout, batch norm) than when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


class Unexportable(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 2 if inputs.sum().item() > 0 else inputs


class OneBatchSize(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(2, -1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, template: Path) -> tuple[mlflow.MlflowClient, str]:
    folder: Path = tmp_path_factory.mktemp("store")
    shutil.copy(template, folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client, client.create_experiment("here", (folder / "artifacts").as_uri())


@pytest.fixture
def run_id(store: tuple[mlflow.MlflowClient, str]) -> str:
    client, experiment = store
    return client.create_run(experiment).info.run_id


@pytest.fixture
def load(store: tuple[mlflow.MlflowClient, str], monkeypatch: pytest.MonkeyPatch):
    """Load by address, as a user does who has set MLFLOW_TRACKING_URI."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0].tracking_uri)
    # What another test's process-wide choice would win over.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    return mlflow.pyfunc.load_model


@pytest.mark.parametrize("example_rows", [1, 2, 5])
def test_logged_model_predicts_batches_of_any_size_as_the_trained_one(store, run_id, load, example_rows):
    client, _ = store
    net = Net()
    net(torch.randn(50, 3, 4))  # moves the batch norm's statistics
    address = log_model(client, run_id, net, torch.randn(example_rows, 3, 4))
    logged = load(address)
    net.eval()
    for rows in (1, 2, 3, 64):
        inputs = torch.randn(rows, 3, 4)
        with torch.no_grad():
            expected = net(inputs).numpy()
        # Same kernels on the same machine; the bound leaves room for another order of sums.
        np.testing.assert_allclose(logged.predict(inputs.numpy()), expected, rtol=1e-5, atol=1e-6)


def test_model_is_found_by_its_run_and_by_its_address(store, run_id, load):
    client, _ = store
    address = log_model(client, run_id, Net(), torch.randn(2, 3, 4), step=7)
    (output,) = client.get_run(run_id).outputs.model_outputs
    assert (f"models:/{output.model_id}", output.step) == (address, 7)
    logged = client.get_logged_model(output.model_id)
    assert (logged.source_run_id, logged.status) == (run_id, "READY")
    described = load(f"runs:/{run_id}/model").metadata
    assert (described.run_id, described.model_id) == (run_id, output.model_id)


def test_model_states_its_shapes_an_example_and_its_requirements(store, run_id, load):
    client, _ = store
    address = log_model(client, run_id, Net(), torch.randn(2, 3, 4))
    model = load(address)
    signature = model.metadata.signature
    assert [spec.shape for spec in signature.inputs] == [(-1, 3, 4)]
    assert [spec.shape for spec in signature.outputs] == [(-1, 3)]
    assert np.shape(model.input_example) == (2, 3, 4)
    folder = Path(mlflow.artifacts.download_artifacts(address))
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {"mlflow", "numpy", "torch"}


def test_logging_leaves_the_live_model_and_process_as_they_were(store, run_id):
    client, _ = store
    net = Net().train()
    net.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    where = mlflow.get_tracking_uri()
    generator = torch.get_rng_state()
    log_model(client, run_id, net, torch.randn(2, 3, 4, generator=torch.Generator()))
    assert net.training
    assert net.trainer is not None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert mlflow.get_tracking_uri() == where
    assert mlflow.active_run() is None
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("model", [Unexportable(), OneBatchSize()])
def test_what_cannot_be_exported_warns_in_one_line_and_leaves_nothing(store, run_id, model, caplog):
    client, experiment = store
    with caplog.at_level(logging.WARNING):
        assert log_model(client, run_id, model, torch.randn(2, 4)) is None
    (record,) = caplog.records
    assert type(model).__name__ in record.getMessage()
    assert "\n" not in record.getMessage()
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    assert len(found) == 0


def test_logging_again_replaces_the_model_of_that_name(store, run_id):
    client, experiment = store
    addresses = [log_model(client, run_id, Net(), torch.randn(2, 3, 4)) for _ in range(2)]
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    assert [model.model_uri for model in found] == addresses[1:]


def test_model_exported_here_runs_where_there_is_a_gpu(store, run_id, load, monkeypatch):
    client, _ = store
    address = log_model(client, run_id, Net(), torch.randn(2, 3, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = load(address)
    assert model.predict(np.zeros((3, 3, 4), dtype=np.float32)).shape == (3, 3)


def test_logging_is_quiet(store, run_id, capfd):
    client, _ = store
    capfd.readouterr()
    log_model(client, run_id, Net(), torch.randn(2, 3, 4))
    assert capfd.readouterr() == ("", "")
