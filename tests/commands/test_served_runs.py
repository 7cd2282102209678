"""The scripts on runs that live on an MLflow server: on this machine nothing of them is left."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import train

from process import Trainees, free_port
from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import PARENT_TAG, REPRODUCES_TAG

pytestmark = [pytest.mark.server, pytest.mark.slow]
TRAINING = ("data=table", "trainer.max_epochs=2")
COLUMNS = "age,sex,bmi,bp,s1,s2,s3,s4,s5,s6"
ROWS = ("59,2,32.1,101,157,93.2,38,4,4.8598,87", "48,1,21.6,87,183,103.2,70,3,3.8918,69")


@dataclass
class Served:
    """A server's address and what it holds."""

    uri: str
    trained: Path  # where the runs were trained, files and all
    one: str
    other: str
    bare: str  # its files were deleted from the server

    def words(self, directory: Path) -> list[str]:
        return ["--uri", self.uri, "--dir", str(directory)]


@pytest.fixture(scope="module")
def served(tmp_path_factory, template) -> Iterator[Served]:
    folder, trained = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("trained")
    trainees, port = Trainees(template), free_port()
    server = trainees.serve(folder / "server", port)
    uri = f"http://127.0.0.1:{port}"
    try:
        one, other = (train(trained, *TRAINING, f"seed={seed}", uri=uri) for seed in (0, 1))
        bare = train(trained, "trainer.max_epochs=1", uri=uri)
        (files,) = (folder / "server" / "artifacts").glob(f"*/{bare}")
        shutil.rmtree(files)
        yield Served(uri, trained, one, other, bare)
    finally:
        server.send(signal.SIGKILL, group=True)
        trainees.close()


@pytest.fixture
def store(served, tmp_path) -> Store:
    return connect(served.uri, tmp_path)


@pytest.fixture
def away(served, tmp_path) -> list[str]:
    """The words that name the server, from a directory where none of its runs was trained."""
    return served.words(tmp_path)


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_served_run_is_tested_again_to_the_bit_and_its_child_is_on_the_server(served, store, away, capsys):
    assert main("evaluate", [served.one, *away]) == 0
    told = dict(line.split(maxsplit=1) for line in lines_of(capsys))
    assert told["note"] == "the same to the bit as recorded by the run"
    run, child = store.client.get_run(served.one), store.search("")[0]
    assert child.data.tags[PARENT_TAG] == served.one
    recorded = {key: value for key, value in run.data.metrics.items() if key.startswith("test/")}
    assert child.data.metrics == recorded != {}


def test_served_run_takes_an_evaluation_once_and_keeps_its_end(served, store, away):
    before = store.client.get_run(served.other).info
    assert main("evaluate", [served.other, "--into-run", *away]) == 0
    run = store.client.get_run(served.other)
    assert run.data.metrics["evaluate/test_loss"] == run.data.metrics["test/loss"]
    assert (run.info.status, run.info.end_time) == ("FINISHED", before.end_time)
    with pytest.raises(BadInput, match="has evaluate/test_loss .* already"):
        main("evaluate", [served.other, "--into-run", *away])


def test_served_run_answers_as_it_does_where_it_was_trained(served, away, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([COLUMNS, *ROWS]) + "\n")
    words = [served.one, str(path), "--format", "csv"]
    found = []
    for where in (away, served.words(served.trained)):
        assert main("predict", [*words, *where]) == 0
        found.append(lines_of(capsys))
    assert found[0] == found[1]
    assert len(found[0]) == 1 + len(ROWS)


def test_served_run_comes_out_identical_on_the_server(served, store, away, capsys):
    assert main("reproduce", [served.one, "trainer.enable_progress_bar=false", *away]) == 0
    assert lines_of(capsys)[-1].startswith("identical: ")
    (again,) = store.search(f"tags.`{REPRODUCES_TAG}` = '{served.one}'")
    assert again.info.status == "FINISHED"


def test_served_runs_are_ranked_and_told_apart_by_what_the_server_keeps(served, away, capsys):
    assert main("compare", ["--json", "--each", "--metric", "score", *away]) == 0
    ranked = [run for place in json.loads(capsys.readouterr().out) for run in place["runs"]]
    assert {served.one, served.other} <= {*ranked}
    for other, packages in (
        (served.other, ["the same"]),
        (served.bare, ["B: not known (its files are gone)"]),
    ):
        assert main("compare", [served.one, other, *away]) == 0
        lines = [line.strip() for line in lines_of(capsys)]
        assert lines[lines.index("packages") + 1 : lines.index("machine") - 1] == packages
        assert lines[lines.index("machine") + 1 : lines.index("metrics") - 1] == packages


@pytest.mark.parametrize("command", ["evaluate", "predict", "reproduce"])
def test_run_whose_files_the_server_lost_is_refused_in_one_line(served, away, command):
    files = ["image.png"] if command == "predict" else []
    with pytest.raises(BadInput, match="deleted") as caught:
        main(command, [served.bare, *files, *away])
    assert "\n" not in str(caught.value)
