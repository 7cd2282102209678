"""A store that version 0.1 left behind: it is still compared, evaluated, rebuilt and continued."""

import csv
import io
import tarfile
from pathlib import Path

import pytest
import torch

from tracklight.commands.parser import main
from tracklight.config.compose import compose
from tracklight.experiment import stored
from tracklight.experiment.train import run
from tracklight.runs.select import select_run
from tracklight.tracking.tags import CHANGES_TAG

STORE = Path(__file__).resolve().parents[1] / "fixtures" / "store-0.1.tar.xz"
LINE = "aa5b612252ed44afa61561d09d2f84d2"
MLP = "dfb3d24e499e4bb49afc370bc53d047a"
SWEEP = "a49635a3abc54825a74b143c7fbd9f77"
TRIALS = {
    "89079f04189e4d199968d179e59ceffb": 12.1995029449463,  # optimizer.lr=0.01
    "9c5d23da32454271a78bb6bf2537e7a1": 5.09890460968018,  # optimizer.lr=0.02
}
KILLED = "d43b4be0c1514c5f81b78b2054081e4d"

pytestmark = pytest.mark.filterwarnings("ignore:.*are now looked for here:UserWarning")


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """The store, unpacked elsewhere than it was made."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tarfile.open(STORE) as archive:
        # The filter has been there since Python 3.11.4, and is missed with a warning since 3.12.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path / "store"


def rows(capsys, directory: Path, *arguments: str) -> list[dict[str, str]]:
    assert main("compare", [*arguments, "--csv", "--dir", str(directory)]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_leaderboard_lists_every_run(directory, capsys):
    found = rows(capsys, directory)
    scores = {row["runs"]: float(row["score"]) for row in found if row["rank"]}
    assert scores == pytest.approx({LINE: 5.97350978851318} | TRIALS)
    (unranked,) = [row for row in found if not row["rank"]]
    assert unranked["runs"] == KILLED and "died" in unranked["flags"]
    (mlp,) = rows(capsys, directory, "--metric", "val/accuracy")
    assert (mlp["runs"], float(mlp["score"])) == (MLP, pytest.approx(0.322))


def test_trials_of_a_sweep_are_ranked(directory, capsys):
    found = rows(capsys, directory, "--sweep", SWEEP)
    assert [row["runs"] for row in found] == sorted(TRIALS, key=TRIALS.__getitem__)
    assert [(row["rank"], float(row["optimizer.lr"])) for row in found] == [
        ("1", 0.02),
        ("2", 0.01),
    ]


@pytest.mark.filterwarnings("ignore:data.root=none. no MNIST files:UserWarning")
def test_evaluation_gives_the_recorded_score(directory, capsys):
    assert main("evaluate", [MLP, "--no-log", "--dir", str(directory)]) == 0
    assert "the same to the bit as recorded by the run" in capsys.readouterr().out


def test_rebuilt_model_has_the_stored_weights(directory):
    store = stored.open_store(None, directory)
    old = select_run(store, MLP)
    model = stored.rebuild(store, old, stored.load_config(store, old), read=False).model
    path = directory / "artifacts" / MLP / "artifacts" / "checkpoints" / "best.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_killed_run_is_continued_to_the_bits_of_an_uninterrupted_one(directory):
    words = [f"tracking.dir={directory}", "tracking.uri=null", "tracking.figures=false"]
    run(compose([*words, f"resume={KILLED}", "allow_changes=true"]))

    store = stored.open_store(None, directory)
    continued = select_run(store, KILLED)
    assert continued.info.status == "FINISHED"
    assert "code: digest 61e91886bd4b" in continued.data.tags[CHANGES_TAG]
    path = directory / "artifacts" / KILLED / "artifacts" / "checkpoints" / "last.ckpt"
    last = torch.load(path, weights_only=True)
    # What version 0.1 ended in when it was not killed, in one thread.
    assert last["global_step"] == 38400
    assert last["state_dict"]["linear.weight"].item() == 1.9984514713287354
    assert last["state_dict"]["linear.bias"].item() == 0.541351854801178
    steps = {
        key: sorted(m.step for m in store.client.get_metric_history(KILLED, key))
        for key in ("train/loss", "train/loss_epoch")
    }
    assert steps["train/loss"] == list(range(640, 38401, 640))
    assert steps["train/loss_epoch"] == list(range(64, 38401, 64))
