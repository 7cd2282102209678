"""What a run prints while it trains."""

import warnings
from types import SimpleNamespace

import pytest
from fitting import Fit
from pytorch_lightning import Trainer
from rich.progress import Progress

from foreign import Blobs
from tracklight.engine import progress
from tracklight.engine.blocks import steps_per_block
from tracklight.engine.progress import EpochLines, RunLine, align_lines, format_time
from tracklight.models.mlp import MLP


class Numbered(MLP):
    """Logs the number of each epoch as it ends."""

    def on_train_epoch_end(self) -> None:
        self.log("train/number", float(self.current_epoch + 1))


def test_an_epochs_line_has_what_the_module_logs_at_its_end(capsys):
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EpochLines()],
    )  # fmt: skip
    model = Numbered(8, 4, hidden=[4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=Blobs(batch_size=16, seed=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"epoch {number}/3  ") and f"train/number {number}" in line


@pytest.mark.parametrize(
    ("total", "num", "numbers"),
    [
        (100, 100, range(1, 101)),
        (250, 250, [1, *range(3, 250, 3), 250]),
        (250, 5, [1, 3, 5]),  # it stops early
        (-1, 1250, [*range(1, 100), *range(100, 1000, 10), 1000, 1100, 1200, 1250]),
    ],
)
def test_a_long_run_prints_about_a_hundred_of_its_epochs_the_first_and_the_last_among_them(
    capsys, total, num, numbers
):
    lines, trainer = EpochLines(), SimpleNamespace(is_global_zero=True, max_epochs=total, callback_metrics={})
    for trainer.current_epoch in range(num):
        lines.on_train_epoch_start(trainer)
        lines.on_train_epoch_end(trainer)
    trainer.current_epoch = num
    lines.on_train_end(trainer)
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"{number}/{total}" for number in numbers]


def test_the_line_moves_within_an_epoch_taken_as_one_batch(monkeypatch):
    steps, done = steps_per_block(2), []
    draw = lambda _, trainer, share: done.append((trainer.global_step, share))  # noqa: E731
    monkeypatch.setattr(RunLine, "_draw", draw)
    fit = Fit(RunLine(None), data=Blobs(batch_size=2, seed=3, num_train=4 * steps), max_epochs=1)
    assert (fit.error, fit.reason) == (None, None)
    assert done[:2] == [(steps, 0.5), (2 * steps, 1.0)]


# Of 13 minibatches an epoch.
@pytest.mark.parametrize(
    ("arguments", "first", "total"),
    [({}, 13, 26), ({"accumulate_grad_batches": 2}, 7, 14), ({"max_steps": 20}, 13, 20)],
)
def test_one_line_on_a_terminal_counts_the_steps_of_the_whole_run_and_the_time_left(
    monkeypatch, capsys, arguments, first, total
):
    drawn, line = [], RunLine("val/loss")

    class Drawn(Progress):
        def update(self, *arguments, **fields) -> None:
            drawn.append((line.trainer.global_step, fields))
            super().update(*arguments, **fields)

    class Timed(RunLine):
        def on_train_start(self, trainer, *_) -> None:
            self.trainer = line.trainer = trainer
            super().on_train_start(trainer)

    # Ten seconds a step, so the time left is that of the steps left.
    clock = SimpleNamespace(perf_counter=lambda: 10.0 * line.trainer.global_step, time=lambda: 0.0)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "Progress", Drawn)
    fit = Fit(Timed("val/loss"), max_epochs=2, **arguments)
    assert (fit.reason is None) == (arguments == {})  # in blocks or not, the steps are those taken
    assert fit.trainer.global_step == total
    *running, (_, last) = drawn
    assert all(fields["description"].endswith(f"/2  step {step}") for step, fields in running)
    ends = {fields["description"]: fields["rest"] for _, fields in running}
    minutes, seconds = divmod(10 * (total - first), 60)
    assert ends[f"epoch 1/2  step {first}"].endswith(f"  0:{minutes:02}:{seconds:02} left")
    assert ends[f"epoch 2/2  step {total}"].endswith("  0:00:00 left")
    _, value = fit.logger.points["val/loss"][-1]
    minutes, seconds = divmod(10 * total, 60)
    assert last["rest"] == f"val/loss {value:.5g}  0:{minutes:02}:{seconds:02}"
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 and shown[0].startswith(f"epoch 2/2  step {total} ") and last["rest"] in shown[0]


def test_the_time_in_the_summary_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(progress.psutil, "Process", lambda: SimpleNamespace(create_time=lambda: 100.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: 112.5))
    assert format_time(2.0, 50) == "2.0 s of training, 12.5 s since the process began, 25 examples/s"
    assert format_time(2.0, 0) == "2.0 s of training, 12.5 s since the process began"


def test_lines_are_aligned_and_empty_ones_left_out():
    assert align_lines({"a": "one", "bcd": "two", "longer": ""}) == "a       one\nbcd     two"
