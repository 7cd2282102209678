"""Resume checkpoints are taken between epochs, two are kept, and the last of a run has its name."""

from pathlib import Path

import pytest
import torch
from fitting import Fit, OneByOne
from pytorch_lightning import Callback, Trainer

from foreign import Blobs
from tracklight.engine import checkpoint_io
from tracklight.engine.checkpoint_io import (
    LAST,
    DurableCheckpointIO,
    checksum_path,
    is_intact,
    load_plain,
    newest_resume_checkpoint,
)
from tracklight.engine.checkpoints import BestCheckpoint, ResumeCheckpoint, apply_changes, keep_last
from tracklight.engine.seeding import seed_run
from tracklight.models.mlp import MLP

IO = DurableCheckpointIO()


def save(folder: Path, step: int, name: str | None = None) -> Path:
    path = folder / (name or f"step-{step:09d}.ckpt")
    IO.save_checkpoint({"state_dict": {}, "global_step": step}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def each_epoch(monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_io, "INTERVAL_S", 0.0)


class Folder(Callback):
    """Notes what lies in a folder as each epoch ends, from the second on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: list[list[str]] = []

    def on_train_epoch_end(self, trainer, module) -> None:
        self.seen.append(sorted(path.stem for path in self.folder.glob("*.ckpt")))


def resuming(folder: Path) -> ResumeCheckpoint:
    callback = ResumeCheckpoint(IO)
    callback.folder = folder
    return callback


def test_two_generations_are_kept_each_taken_when_its_epoch_is_over(tmp_path, each_epoch):
    seen = Folder(tmp_path)
    fit = Fit(resuming(tmp_path), seen, max_epochs=4, plugins=[IO])
    assert fit.error is None
    step = "step-{:09d}".format
    assert seen.seen == [[], [step(13)], [step(13), step(26)], [step(26), step(39)]]
    assert [path.stem for path in sorted(tmp_path.glob("*.ckpt"))] == [step(39), step(52)]
    assert all(is_intact(path) for path in tmp_path.glob("*.ckpt"))
    taken = torch.load(tmp_path / f"{step(39)}.ckpt", weights_only=True)
    assert (taken["epoch"], taken["global_step"]) == (3, 39)


def test_quick_epochs_are_not_all_committed_but_the_last_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "INTERVAL_S", 1e6)
    Fit(resuming(tmp_path), max_epochs=5, plugins=[IO])
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step-000000065.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("metric", ["val/loss", "train/loss_epoch"])
@pytest.mark.parametrize("hook", ["", "on_save_checkpoint"])
def test_best_weights_that_waited_are_those_that_each_epoch_would_have_written(
    tmp_path, monkeypatch, metric, hook
):
    class Hooked(MLP):
        def on_save_checkpoint(self, checkpoint) -> None:
            checkpoint["mine"] = self.trainer.current_epoch

    found, dumps, dump = [], [], Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *a, **k: dumps.append(a) or dump(*a, **k))
    for interval_s in (0.0, 1e6):
        monkeypatch.setattr(checkpoint_io, "INTERVAL_S", interval_s)
        dumps.clear()
        io, best = DurableCheckpointIO(), BestCheckpoint(metric, "min", within_epochs=False)
        best.dirpath = str(tmp_path)
        seed_run(3)
        module = Hooked(8, 4, hidden=[6]) if hook else None
        fit = Fit(best, module=module, max_epochs=8, plugins=[io])
        assert fit.error is None
        io.write_pending()
        found.append((load_plain(tmp_path / "best.ckpt"), best.state_dict()))
        assert (len(dumps) == 1) == (interval_s > 0 and not hook)  # by Lightning, of all its state
    (written, state), (waited, same) = found
    assert state == same and written.keys() == waited.keys()
    assert written["epoch"] == waited["epoch"] > 1
    assert written.get("mine") == waited.get("mine") == (written["epoch"] if hook else None)
    assert all(map(torch.equal, written["state_dict"].values(), waited["state_dict"].values()))


@pytest.mark.parametrize("callbacks", [(), (OneByOne(),)], ids=["blocks", "plain"])
def test_a_run_stopped_anywhere_and_continued_has_the_bits_of_one_that_was_not(
    tmp_path, each_epoch, callbacks
):
    from pytorch_lightning import Trainer

    def plateau(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=10.0, factor=0.5
        )
        return {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.current_epoch == 3:
                raise RuntimeError("stopped")

        supports_blocks = True

    whole = Fit(*callbacks, max_epochs=5, scheduler=plateau, plugins=[IO])
    stopped = Fit(*callbacks, resuming(tmp_path), Stop(), max_epochs=5, scheduler=plateau, plugins=[IO])
    assert str(stopped.error) == "stopped"
    path = newest_resume_checkpoint(tmp_path)
    assert path is not None and path.name == "step-000000039.ckpt"

    original = Trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self, *a, **k: original(self, *a, ckpt_path=str(path), **k))
        continued = Fit(*callbacks, resuming(tmp_path), max_epochs=5, scheduler=plateau, plugins=[IO])
    assert continued.error is None
    assert continued.same_bits(whole)
    tail = [point for point in whole.logger.points["train/loss"] if point[0] > 39]
    assert continued.logger.points["train/loss"] == tail


def test_weights_that_wait_are_written_before_those_of_another_file_wait(tmp_path):
    io, own, theirs = DurableCheckpointIO(), tmp_path / "own" / "best.ckpt", tmp_path / "theirs" / "best.ckpt"

    def weights(value: float) -> dict:
        return {"state_dict": {"weight": torch.tensor(value)}, "epoch": 0, "global_step": 1}

    io.save_checkpoint(weights(1.0), own)
    io.save_checkpoint(weights(2.0), theirs)  # within the same second: it waits
    assert io.keep_best(own, weights(3.0))
    assert load_plain(theirs)["state_dict"]["weight"] == 2.0
    io.write_pending()
    assert load_plain(own)["state_dict"]["weight"] == 3.0


def test_the_last_one_of_a_finished_run_has_its_name_and_stands_alone(tmp_path):
    save(tmp_path, 13)
    save(tmp_path, 26)
    keep_last(tmp_path, IO)
    assert names(tmp_path) == [LAST, checksum_path(tmp_path / LAST).name]
    assert newest_resume_checkpoint(tmp_path) == tmp_path / LAST


def test_a_run_extended_replaces_the_last_one_of_its_earlier_end(tmp_path):
    save(tmp_path, 26, LAST)
    save(tmp_path, 39)
    save(tmp_path, 52)
    keep_last(tmp_path, IO)
    assert names(tmp_path) == [LAST, checksum_path(tmp_path / LAST).name]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 52


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("earlier", [False, True])
def test_naming_the_last_one_survives_a_crash_at_every_call(tmp_path, monkeypatch, call, earlier):
    class Crash(BaseException):
        pass

    if earlier:
        save(tmp_path, 13, LAST)
    save(tmp_path, 26)
    save(tmp_path, 39)
    calls = iter(range(1, 100))

    def crashing(original):
        def crash(*args, **kwargs):
            if next(calls) == call:
                raise Crash
            return original(*args, **kwargs)

        return crash

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, crashing(getattr(Path, name)))
    try:
        keep_last(tmp_path, IO)
    except Crash:
        monkeypatch.undo()
        path = newest_resume_checkpoint(tmp_path)
        assert path is not None
        assert torch.load(path, weights_only=True)["global_step"] == 39
        keep_last(tmp_path, IO)
        from tracklight.engine.checkpoint_io import remove_leftovers

        remove_leftovers(tmp_path)
    assert names(tmp_path) == [LAST, checksum_path(tmp_path / LAST).name]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 39


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_one_of_version_0_1_whose_best_was_a_plain_model_checkpoint_is_continued(tmp_path, each_epoch):
    def fit(epochs, path=None):
        best = BestCheckpoint("val/loss", "min", within_epochs=False)
        best.dirpath = str(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            original = Trainer.fit
            patch.setattr(Trainer, "fit", lambda self, *a, **k: original(self, *a, ckpt_path=path, **k))
            fit = Fit(resuming(tmp_path), best, max_epochs=epochs, plugins=[IO])
        assert fit.error is None, fit.error
        return fit, best

    _, before = fit(2)
    checkpoint = torch.load(newest_resume_checkpoint(tmp_path), weights_only=True)
    states = checkpoint["callbacks"]
    states[before.state_key.replace("Best", "Model")] = states.pop(before.state_key)
    del states["ResumeCheckpoint"]["position"]
    IO.save_checkpoint(checkpoint, tmp_path / "old.ckpt")
    continued, best = fit(2, str(tmp_path / "old.ckpt"))  # trains no more
    assert best.best_model_score == before.best_model_score and best.best_model_path
    assert continued.trainer.global_step == checkpoint["global_step"]


def test_a_damaged_one_of_a_later_step_makes_way_for_two_whole_ones(tmp_path, each_epoch):
    (tmp_path / "step-000000999.ckpt").write_bytes(b"damaged")
    Fit(resuming(tmp_path), data=Blobs(16, 3), max_epochs=3, plugins=[IO])
    assert [path.name for path in sorted(tmp_path.glob("*.ckpt"))] == [
        "step-000000026.ckpt",
        "step-000000039.ckpt",
    ]


def test_changed_settings_win_over_the_stored_state_of_optimizer_and_schedule():
    def steps(lr, momentum, gamma, num, state=None):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=lr, momentum=momentum)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma)
        if state:
            apply_changes({"optimizer.lr": (0.1, lr), "scheduler.gamma": (0.5, gamma)}, state)
            apply_changes({"optimizer.momentum": (0.9, momentum), "seed": (1, 2)}, state)
            optimizer.load_state_dict(state["optimizer_states"][0])
            scheduler.load_state_dict(state["lr_schedulers"][0])
        for _ in range(num):
            optimizer.step()
            scheduler.step()
        states = {"optimizer_states": [optimizer.state_dict()]}
        return optimizer, states | {"lr_schedulers": [scheduler.state_dict()]}

    _, stored = steps(0.1, 0.9, 0.5, 3)
    optimizer, _ = steps(0.3, 0.0, 0.1, 3, stored)
    group = optimizer.param_groups[0]
    # halved at step 2 as configured then, to a tenth at 4 and 6 as configured now
    assert group["lr"] == pytest.approx(0.3 * 0.5 * 0.1 * 0.1, rel=1e-12)
    assert (group["momentum"], group["initial_lr"]) == (0.0, pytest.approx(0.3))
