"""Schedules without a length of their own span the run as it will be."""

import math
from pathlib import Path

import pytest
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder

from tracklight.config.compose import compose
from tracklight.errors import BadInput
from tracklight.experiment import build
from tracklight.experiment.train import run

GROUPS = "+callbacks.groups._target_=pytorch_lightning.callbacks.GradientAccumulationScheduler"


class Rates(Callback):
    """Remembers the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def rates(tmp_path: Path):
    """Train on 28 rows in batches of 8, 8, 8 and 4; return the learning rates."""
    path = tmp_path / "table.csv"
    rows = [f"{i % 7},{i % 5},{i % 7 + 2 * (i % 5)}" for i in range(40)]
    path.write_text("\n".join(["a,b,y", *rows]) + "\n")

    def rates(*overrides: str, test: bool = True) -> list[float]:
        base = ["data=table", f"data.path={path}", "data.target=y", "data.batch_size=8", "tracking=none"]
        seen = Rates()
        quiet = "trainer.enable_progress_bar=false"
        words = [*base, "scheduler=cosine", "optimizer.lr=0.1", quiet, *overrides]
        run(compose(words), callbacks=[seen], test=test)
        return seen.rates

    return rates


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["trainer.max_epochs=2"], 8),
        (["trainer.max_epochs=100", "trainer.max_steps=6"], 6),
        (["trainer.max_epochs=3", "trainer.accumulate_grad_batches=3"], 6),
        (["trainer.max_epochs=4", GROUPS, "+callbacks.groups.scheduling={0:1,2:4}"], 10),
        (["trainer.max_epochs=4", GROUPS, "+callbacks.groups.scheduling={2:3}", "trainer.max_steps=9"], 9),
        (["trainer.max_epochs=3", "trainer.limit_train_batches=3"], 9),
        (["trainer.max_epochs=3", "trainer.overfit_batches=2"], 6),
        (["trainer.fast_dev_run=3"], 3),
    ],
)
def test_a_schedule_by_steps_spans_the_steps_that_are_taken(rates, overrides, steps):
    expected = [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates(*overrides) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        (["trainer.max_epochs=3"], [4, 4, 4]),
        (["trainer.max_epochs=100", "trainer.max_steps=6"], [4, 2]),
        (["trainer.max_epochs=9", "trainer.max_steps=8"], [4, 4]),
        (["trainer.max_epochs=9", "trainer.max_steps=3", "trainer.accumulate_grad_batches=3"], [2, 1]),
    ],
)
def test_a_schedule_by_epochs_spans_the_epochs_that_begin(rates, overrides, epochs):
    total = len(epochs)
    by_epoch = [0.05 * (1 + math.cos(math.pi * epoch / total)) for epoch in range(total)]
    expected = [rate for rate, steps in zip(by_epoch, epochs, strict=True) for _ in range(steps)]
    assert rates("scheduler.interval=epoch", *overrides) == pytest.approx(expected)


def test_a_schedule_that_steps_at_every_second_epoch_spans_half_as_many(rates):
    found = rates("scheduler.interval=epoch", "+scheduler.frequency=2", "trainer.max_epochs=4")
    assert found == pytest.approx([0.1] * 8 + [0.05] * 8)


@pytest.mark.parametrize("every", [1, 3])
def test_a_schedule_at_every_third_step_spans_the_batches_of_an_epoch_that_are_a_third(rates, every):
    accumulation = f"trainer.accumulate_grad_batches={every}"  # of four batches the third ends a step, too
    found = rates("scheduler.interval=step", "+scheduler.frequency=3", "trainer.max_epochs=6", accumulation)
    before = [
        epoch + (batch > 3) for epoch in range(6) for batch in range(1, 5) if batch % every == 0 or batch == 4
    ]
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * count / 6)) for count in before])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.limit_train_batches=0.1"], "limit_train_batches=0.1 leaves none of 4 batches to train"),
        (["trainer.limit_val_batches=0.5"], "limit_val_batches=0.5 leaves none of 1 batches to val"),
        (["trainer.limit_test_batches=0.5"], "limit_test_batches=0.5 leaves none of 1 batches to test"),
        (
            ["trainer.val_check_interval=2", "trainer.accumulate_grad_batches=3"],
            "would validate amid the 3 batches of a step; try trainer.val_check_interval=3$",
        ),
        (["trainer.overfit_batches=0.1"], "overfit_batches=0.1 leaves none of 4 batches to train"),
    ],
)
def test_what_would_fail_after_training_is_refused_before_it(rates, words, message):
    with pytest.raises(BadInput, match=message):
        rates("trainer.max_epochs=1", *words)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("BatchSizeFinder", "-m data.batch_size="),
        ("LearningRateFinder", "-m sweep=lr"),
        ("OnExceptionCheckpoint", "resume=auto"),
    ],
)
def test_a_finder_in_a_trial_is_refused_with_the_search_that_records_what_it_finds(rates, name, instead):
    with pytest.raises(BadInput, match=f"callbacks.finder={name}.*{instead}"):
        where = ", dirpath: a" * (name == "OnExceptionCheckpoint")
        rates(f"+callbacks.finder={{_target_: pytorch_lightning.callbacks.{name}{where}}}", test=False)


@pytest.mark.parametrize("brought", [BatchSizeFinder(), [LearningRateFinder()]])
def test_so_is_one_that_a_module_brings(brought):
    module = LightningModule()
    module.configure_callbacks = lambda: brought
    with pytest.raises(BadInput, match="LightningModule's callback .*Finder would train .*; leave it out"):
        build.check_module_callbacks(module)


@pytest.mark.parametrize(("key", "kind"), [("profiler", "Profiler"), ("strategy", "Strategy")])
def test_an_object_of_another_kind_is_refused_for_the_trainer(rates, key, kind):
    with pytest.raises(BadInput, match=f"trainer.{key}._target_=torch.nn.Identity is no {kind}$"):
        rates(f"trainer.{key}={{_target_: torch.nn.Identity}}")


def test_a_progress_bar_of_ones_own_stands_in_for_ours(capsys):
    own = "+callbacks.bar={_target_: pytorch_lightning.callbacks.TQDMProgressBar, refresh_rate: 0}"
    for more, num_lines in (([], 2), ([own], 0)):
        run(compose(["tracking=none", "trainer.max_epochs=2", "trainer.accelerator=cpu", *more]))
        shown = capsys.readouterr().out
        assert shown.count("epoch 1/2") + shown.count("epoch 2/2") == num_lines, shown
