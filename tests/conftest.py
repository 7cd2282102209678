import functools
import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import slurm
from process import Programs, Trainees
from trainee import LATEST

ROOT = Path(__file__).resolve().parents[1]
GC_THRESHOLDS = (50_000, 10, 10)  # as in the command line
MNIST_ROOT = Path(os.environ.get("MNIST_ROOT", ROOT.parent / "shared" / "mnist"))

# A proxy of the one who runs the tests is not for their servers.
os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy"), "127.0.0.1,localhost")))

# Started under nohup or in the background the tests would ignore these, and so would their runs.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """One more than there are cores for the fast tests, which wait for the disk a third of their time."""
    return (yield) + (config.option.markexpr != "slow")


_num_frozen = 0  # modules


def pytest_runtest_setup() -> None:
    """Freeze the million objects of imports: else each full collection of garbage takes half a second."""
    global _num_frozen
    if len(sys.modules) > _num_frozen + 50:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        _num_frozen = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (MNIST_ROOT / "MNIST" / "raw").is_dir():
        skip = pytest.mark.skip(reason=f"needs the 70,000 images of MNIST in {MNIST_ROOT}, or MNIST_ROOT set")
        for item in items:
            if "full_mnist" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def mnist_root() -> Path:
    return MNIST_ROOT


@pytest.fixture(scope="session", autouse=True)
def template(tmp_path_factory) -> Iterator[Path]:
    """A new database, to be copied, and copied in this process wherever a new one is asked for.

    Making one takes MLflow a second and a half, and reading which schema is the latest, at each opening,
    longer than all else.
    """
    from mlflow.store.db import utils

    from tracklight.tracking import mlflow_client, sqlite_file

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow_client.create_database(path, (path.parent / "artifacts").as_uri())

    def copy(target: Path, artifact_root: str) -> None:
        shutil.copyfile(path, target)  # with the mode of a new file
        with closing(sqlite3.connect(target)) as database, database:
            query = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0"
            database.execute(query, (f"{artifact_root}/0",))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_file, "create_database", copy)
        patch.setattr(utils, LATEST, functools.cache(getattr(utils, LATEST)))
        yield path


@pytest.fixture
def directory(tmp_path: Path, template: Path) -> Path:
    """A tracking directory with an empty store."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def store(directory: Path):
    """An empty store in `tmp_path`."""
    from tracklight.tracking.store import connect

    with closing(connect(None, directory)) as store:
        yield store


class Finished:
    """A run of this process, as MLflow and its folder have it."""

    def __init__(self, directory: Path, run_id: str, score: float | None):
        self.client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
        self.run = self.client.get_run(run_id)
        self.folder = directory / "artifacts" / run_id / "artifacts"
        self.score = score

    def history(self, key: str) -> list[tuple[int, float]]:
        points = self.client.get_metric_history(self.run.info.run_id, key)
        return sorted((point.step, point.value) for point in points)

    def checkpoint(self, name: str) -> dict[str, Any]:
        import torch

        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture
def spare_model(monkeypatch) -> None:
    """Let runs log no model, which takes longer than to train these."""
    monkeypatch.setattr("tracklight.experiment.record.log_model", lambda *_, **__: None)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Finished]:
    """Train as the command line would, in this process, tracked below `tmp_path`."""

    def train(*overrides: str) -> Finished:
        from tracklight.config.compose import compose
        from tracklight.experiment.train import run

        directory = tmp_path / "runs"
        here = [f"tracking.dir={directory}", "tracking.uri=null"]
        score = run(compose([*overrides, *here, "trainer.enable_progress_bar=false"]))
        client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
        experiments = [each.experiment_id for each in client.search_experiments()]
        newest = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
        return Finished(directory, newest[0].info.run_id, score)

    return train


@pytest.fixture(scope="session")
def trainees(template) -> Iterator[Trainees]:
    """Training processes and sweeps, forked from one that has imported all of it."""
    trainees = Trainees(template)
    yield trainees
    trainees.close()


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Iterator[Programs]:
    """Short programs in processes of their own, in which Hydra is imported but nothing of ours."""
    programs = Programs(tmp_path_factory.mktemp("programs"), "hydra.main", "hydra.experimental.callbacks")
    yield programs
    programs.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[slurm.Cluster]:
    """A Slurm cluster of one node with two cores."""
    if problem := slurm.missing():
        pytest.skip(problem)
    cluster = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture
def git() -> Callable[..., str]:
    """Run git in a folder, as somebody; without git the test is skipped."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk")

    def run(folder: Path, *arguments: str) -> str:
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    return run
