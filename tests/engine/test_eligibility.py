"""Each setting that could tell a block from single steps leads to single steps."""

from datetime import timedelta

import pytest
import torch
from fitting import QUIET, Fit, OneByOne
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.profilers import SimpleProfiler
from torch.utils.data import DataLoader, TensorDataset

from foreign import Blobs, Net, NoisyData
from tracklight.engine.eligibility import (
    CALLBACK_HOOKS,
    MODULE_HOOKS,
    TRANSFER_HOOKS,
    unsupported_argument,
)
from tracklight.models.mlp import MLP

STEPS = 13  # of an epoch: 200 examples in minibatches of 16


def halving(optimizer):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return {"scheduler": scheduler, "interval": "step"}


class Seen(Callback):
    """Counts optimizer steps and batches by the hooks that Lightning calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.steps: list[int] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.steps.append(trainer.global_step)
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.append(len(batch[1]))


def test_by_default_steps_are_taken_in_blocks():
    fit = Fit()
    assert (fit.error, fit.reason, fit.trainer.num_training_batches) == (None, None, 1)
    assert fit.trainer.global_step == 2 * STEPS


def test_callbacks_without_batch_hooks_keep_blocks(tmp_path):
    fit = Fit(
        EarlyStopping("val/loss"),
        LearningRateMonitor("epoch"),
        ModelCheckpoint(tmp_path, monitor="val/loss"),
        TQDMProgressBar(),
        enable_progress_bar=True,
    )
    # the learning rate monitor overrides hooks of each batch, whatever its interval
    assert fit.reason == "callback LearningRateMonitor overrides on_train_batch_start"
    by_step = Fit(LearningRateMonitor("step"), scheduler=halving).logger.points["lr-Adam"]
    assert [value for _, value in by_step] == [0.01 * 0.5**step for step in range(2 * STEPS)]
    assert Fit(EarlyStopping("val/loss"), ModelCheckpoint(tmp_path / "2")).reason is None


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_max_steps_really_stops_there(steps):
    fit = Fit(max_steps=steps)
    assert fit.trainer.global_step == steps
    assert fit.reason == f"trainer.max_steps={steps}"


def test_min_steps_are_taken_though_a_callback_requests_a_stop():
    class Stopping(Callback):
        def on_validation_end(self, trainer, *_) -> None:
            trainer.should_stop = True

    assert Fit(Stopping()).trainer.global_step == STEPS
    fit = Fit(Stopping(), min_steps=20)
    assert (fit.reason, fit.trainer.global_step) == ("trainer.min_steps=20", 20)


@pytest.mark.parametrize(("limit", "steps"), [(10, 10), (0.5, 6), (1, 1)])
def test_limit_train_batches_counts_minibatches(limit, steps):
    seen = Seen()
    fit = Fit(seen, max_epochs=1, limit_train_batches=limit)
    assert fit.trainer.global_step == len(seen.batches) == steps
    assert Fit(max_epochs=1, limit_train_batches=limit).reason == (f"trainer.limit_train_batches={limit}")


def test_overfit_batches_and_fast_dev_run_are_plain():
    assert Fit(overfit_batches=2, max_epochs=1).trainer.global_step == 2
    # Lightning turns it into the limit on batches
    assert Fit(overfit_batches=2).reason == "trainer.limit_train_batches=2"
    fit = Fit(fast_dev_run=3)
    assert (fit.trainer.global_step, fit.reason is not None) == (3, True)


def test_clipping_bounds_the_gradient_of_each_step():
    fit = Fit(gradient_clip_val=1e-3, max_epochs=1)
    assert fit.reason == "trainer.gradient_clip_val=0.001"
    seen = Seen()
    Fit(seen, gradient_clip_val=1e-3, max_epochs=1)
    assert len(seen.norms) == STEPS
    assert max(seen.norms) > 1e-3  # measured before clipping

    class AfterClipping(MLP):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            grads = [p.grad for p in self.parameters()]
            clipped.append(torch.nn.utils.get_total_norm(grads).item())

    clipped: list[float] = []
    Fit(module=AfterClipping(8, 4, hidden=[6]), gradient_clip_val=1e-3, max_epochs=1)
    assert len(clipped) == STEPS
    assert max(clipped) <= 1.0001e-3


def test_accumulation_steps_once_in_so_many_minibatches():
    seen = Seen()
    fit = Fit(seen, accumulate_grad_batches=4, max_epochs=1)
    assert (fit.trainer.global_step, len(seen.batches)) == (4, STEPS)  # 4, 4, 4 and the last 1
    assert Fit(accumulate_grad_batches=4).reason == "trainer.accumulate_grad_batches=4"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"val_check_interval": 4}, "trainer.val_check_interval=4"),
        ({"val_check_interval": 0.5}, "trainer.val_check_interval=0.5"),
        (
            {"val_check_interval": 10, "check_val_every_n_epoch": None},
            "trainer.val_check_interval=10",
        ),
    ],
)
def test_validation_within_an_epoch_happens_there(arguments, reason):
    fit = Fit(**arguments)
    assert fit.reason == reason
    wanted = {4: [4, 8, 12, 17, 21, 25], 0.5: [6, 12, 19, 25], 10: [10, 20]}
    steps = [step for step, _ in fit.logger.points["val/loss"]]
    assert steps == wanted[arguments["val_check_interval"]]


def test_what_stops_in_time_stops_within_an_epoch():
    fit = Fit(max_time={"milliseconds": 1})
    assert (fit.reason, fit.trainer.global_step) == ("trainer.max_time", 1)
    assert Fit(Timer("00:00:01:00")).reason == "trainer.max_time"


def test_a_profiler_times_each_step():
    profiler = SimpleProfiler()
    fit = Fit(profiler=profiler, max_epochs=1)
    assert str(fit.reason).startswith("trainer.profiler")
    assert len(profiler.recorded_durations["run_training_batch"]) == STEPS


def test_anomaly_detection_names_a_backward_pass_that_gives_nan():
    class Rooted(MLP):
        def loss(self, outputs, targets):
            return super().loss(outputs, targets) + (0 * outputs).abs().sqrt().sum()

    fit = Fit(module=Rooted(8, 4, hidden=[6]), detect_anomaly=True)
    assert fit.reason == "trainer.detect_anomaly=True"
    assert "returned nan values" in str(fit.error)


def test_half_precision_is_what_each_step_computes_in():
    kinds = set()

    class Typed(MLP):
        def loss(self, outputs, targets):
            kinds.add(outputs.dtype)
            return super().loss(outputs, targets)

    fit = Fit(module=Typed(8, 4, hidden=[6]), precision="bf16-mixed", limit_val_batches=0)
    assert fit.reason == "trainer.precision=bf16-mixed"
    assert kinds == {torch.bfloat16}


def test_one_device_by_a_strategy_of_several_is_plain():
    trainer = Trainer(**QUIET, accelerator="cpu", devices=1, strategy="ddp", logger=False)
    assert str(unsupported_argument(trainer)).startswith("trainer.strategy=")
    several = Trainer(**QUIET, accelerator="cpu", devices=2, strategy="ddp", logger=False)
    assert unsupported_argument(several) == "trainer.devices=2"
    nodes = Trainer(**QUIET, accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", logger=False)
    assert unsupported_argument(nodes) == "trainer.num_nodes=2"


def test_validation_by_the_clock_is_plain():
    reason = Fit(val_check_interval="00:00:10:00").reason
    assert str(reason).startswith("trainer.val_check_interval")


def test_accumulation_on_a_schedule_accumulates():
    fit = Fit(GradientAccumulationScheduler({0: 4}), max_epochs=1)
    assert fit.reason == "callback GradientAccumulationScheduler"
    assert fit.trainer.global_step == -(-STEPS // 4)


def test_a_callback_made_of_functions_is_called_at_each_step():
    calls = []
    fit = Fit(LambdaCallback(on_train_batch_end=lambda *_: calls.append(1)))
    assert fit.reason == "callback LambdaCallback overrides on_train_batch_end"
    assert len(calls) == 2 * STEPS


def test_checkpoints_by_the_clock_are_written_within_an_epoch(tmp_path):
    clock = ModelCheckpoint(tmp_path, train_time_interval=timedelta(microseconds=1), save_top_k=-1)
    fit = Fit(clock, max_epochs=1)
    assert fit.reason == "ModelCheckpoint by step or time"
    assert len([*tmp_path.iterdir()]) == STEPS


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
def test_a_learning_rate_finder_tries_rates_step_by_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = LearningRateFinder(num_training_steps=20, update_attr=False)
    fit = Fit(finder)
    assert (fit.error, fit.reason) == (None, "callback LearningRateFinder")
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) == 20


def test_checkpoints_by_step_are_written_at_their_steps(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    fit = Fit(checkpoint)
    assert fit.reason == "ModelCheckpoint by step or time"
    steps = sorted(int(path.stem.split("=")[-1]) for path in tmp_path.iterdir())
    assert steps == [5, 10, 15, 20, 25]


@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
def test_a_callback_with_a_step_hook_is_called_at_each_step(hook):
    calls = []

    def record(self, trainer, *_, **__) -> None:
        calls.append(trainer.global_step)

    fit = Fit(type("Listening", (Callback,), {hook: record})())
    assert fit.reason == f"callback Listening overrides {hook}"
    assert len(calls) == 2 * STEPS


@pytest.mark.filterwarnings("ignore:You have overridden")
@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_a_module_that_overrides_a_step_hook_keeps_it(hook):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(hook)
        return getattr(MLP, hook)(self, *args, **kwargs)

    fit = Fit(module=type("Own", (MLP,), {hook: override})(8, 4, hidden=[6]))
    assert fit.error is None
    assert fit.reason == f"Own overrides {hook}"
    if hook not in ("configure_gradient_clipping", "lr_scheduler_step"):
        assert len(calls) >= 2 * STEPS


@pytest.mark.parametrize("hook", TRANSFER_HOOKS)
def test_data_that_override_a_transfer_hook_keep_it(hook):
    def override(self, batch, *args):
        calls.append(hook)
        return getattr(Blobs, hook)(self, batch, *args)

    calls: list[str] = []
    fit = Fit(data=type("Own", (Blobs,), {hook: override})(batch_size=16, seed=3))
    assert fit.reason == f"Own overrides {hook}"
    assert len(calls) >= 2 * STEPS


def test_data_with_a_loader_of_their_own_keep_it():
    class Own(Blobs):
        def train_dataloader(self):
            train = self.splits["train"]
            rows = TensorDataset(train.features, train.targets)
            return DataLoader(rows, batch_size=40, num_workers=0)

    fit = Fit(data=Own(batch_size=16, seed=3, num_train=200), max_epochs=1)
    assert (fit.error, fit.reason) == (None, "Own overrides train_dataloader")
    assert fit.trainer.global_step == 5


def test_own_training_steps_manual_optimization_and_foreign_parts_are_plain():
    class Own(MLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    class Manual(MLP):
        def training_step(self, batch, batch_idx) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(self(batch[0]), batch[1]).backward()
            optimizer.step()

    manual = Manual(8, 4, hidden=[6])
    manual.automatic_optimization = False
    assert Fit(module=Own(8, 4, hidden=[6])).reason == "Own takes its training steps in its own way"
    fit = Fit(module=manual)
    assert (fit.reason, fit.trainer.global_step) == (
        "Manual takes its training steps in its own way",
        2 * STEPS,
    )
    foreign = NoisyData(num_workers=0)
    assert Fit(data=foreign, max_epochs=1).reason.startswith("NoisyData is not a tracklight data")
    assert Fit(module=Net(8, 4)).reason == "Net is not a tracklight model (Supervised)"


def test_optimizers_that_need_a_closure_are_plain():
    class Quasi(MLP):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    fit = Fit(module=Quasi(8, 4, hidden=[6]))
    assert fit.reason == "the optimizer needs a closure, or there are several"
    assert (fit.error, fit.trainer.global_step) == (None, 2 * STEPS)


def test_schedulers_by_step_that_blocks_cannot_time_are_plain():
    def every_third(optimizer):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"scheduler": scheduler, "interval": "step", "frequency": 3}

    fit = Fit(scheduler=every_third, max_epochs=1)
    assert fit.reason == "scheduler ExponentialLR steps on a metric or not every step"
    assert fit.trainer.optimizers[0].param_groups[0]["lr"] == 0.01 * 0.5 ** (STEPS // 3)


def test_a_plateau_looked_for_at_each_step_is_plain():
    def plateau(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=1e9, eps=0.0
        )
        return {"scheduler": scheduler, "interval": "step", "monitor": "train/loss"}

    fit = Fit(scheduler=plateau, max_epochs=1)
    assert fit.reason == "scheduler ReduceLROnPlateau steps on a metric or not every step"
    assert fit.trainer.optimizers[0].param_groups[0]["lr"] == 0.01 * 0.5**STEPS


def test_the_reason_for_single_steps_is_reported_once():
    assert Fit(OneByOne()).reason == "callback OneByOne overrides on_train_batch_end"
