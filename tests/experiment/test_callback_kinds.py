"""Lightning's own callbacks: with each of them a run ends as in plain Lightning, killed and continued too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from test_foreign_modules import project, same, sweep, weights, words

import module_kinds
from tracklight import paths
from tracklight.commands.parser import main
from tracklight.config.instantiate import instantiate
from tracklight.engine.seeding import seed_run
from tracklight.errors import BadInput

__all__ = ["project"]  # a fixture
pytestmark = [  # of Lightning, with these callbacks
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")
    for said in (
        ".*does not have many workers",
        "The provided params to be frozen already exist",
        r"`.fit\(ckpt_path=None\)` was called without a model",
        "You're using the WeightAveraging callback",
    )
]

OF_LIGHTNING, OURS = "pytorch_lightning.callbacks.", "module_kinds."
EPOCHS = 4
CALLBACKS: dict[str, dict[str, Any]] = {
    "checkpoint": {"_target_": "ModelCheckpoint", "monitor": "val_loss", "save_top_k": 2},
    "stopping": {"_target_": "EarlyStopping", "monitor": "val_loss", "patience": 1, "min_delta": 0.15},
    "rates": {"_target_": "LearningRateMonitor"},
    "timer": {"_target_": "Timer", "duration": {"hours": 1}},
    "swa": {"_target_": "StochasticWeightAveraging", "swa_lrs": 0.01, "swa_epoch_start": 1},
    "averaging": {"_target_": "WeightAveraging"},
    "ema": {"_target_": "EMAWeightAveraging", "decay": 0.9},
    "accumulation": {"_target_": "GradientAccumulationScheduler", "scheduling": {0: 1, 2: 2}},
    "pruning": {"_target_": "ModelPruning", "pruning_fn": "l1_unstructured", "amount": 0.2},
    "backbone": {"_target_": "BackboneFinetuning", "unfreeze_backbone_at_epoch": 1, "train_bn": False},
    "finetuning": {"_target_": "Gradual"},
    "lambda": {"_target_": "LambdaCallback", "on_train_epoch_end": {"_target_": "Shrink"}},
    "device": {"_target_": "DeviceStatsMonitor", "cpu_stats": True},
    "writer": {"_target_": "Writer"},
}
REFUSED = ("pruning", "backbone", "finetuning")  # whose state no checkpoint of Lightning's holds
AVERAGING = ("swa", "averaging", "ema")
slow = pytest.mark.slow


def node_of(name: str, folder: Path) -> dict[str, Any]:
    """The config node of a callback, with whole names of classes."""
    node: dict[str, Any] = json.loads(json.dumps(CALLBACKS[name]).replace("???", str(folder)))
    for each in (node, *(value for value in node.values() if isinstance(value, dict))):
        if (target := each.get("_target_")) is not None:
            each["_target_"] = (OURS if target in ("Gradual", "Shrink", "Writer") else OF_LIGHTNING) + target
    if "scheduling" in node:
        node["scheduling"] = {int(key): value for key, value in node["scheduling"].items()}
    return node


def command(name: str) -> tuple[str, ...]:
    module = "Backbone" if name in ("backbone", "finetuning") else "Plain"
    return (*words(f"module_kinds.{module}"), f"trainer.max_epochs={EPOCHS}", f"callbacks={name}")


def write_callbacks(conf: Path, folder: Path) -> None:
    (conf / "callbacks").mkdir(parents=True, exist_ok=True)
    for name in CALLBACKS:
        (conf / "callbacks" / f"{name}.yaml").write_text(f"one: {node_of(name, folder)}\n")


@pytest.fixture(autouse=True)
def files(project, spare_model, tmp_path) -> None:
    """The config files of these callbacks; a model is logged elsewhere."""
    write_callbacks(paths.PROJECT.conf, tmp_path / "elsewhere")


class Heard(Callback):
    """Remembers the validation's loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


class Best(ModelCheckpoint):
    """A class of its own: of one class, Lightning allows two with the same metric no state."""


def plain(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """What plain Lightning gives: the best and the last weights, and the loss of each epoch."""
    torch.set_num_threads(1)
    seed_run(0)
    module = module_kinds.Backbone() if name in ("backbone", "finetuning") else module_kinds.Plain()
    node, heard = node_of(name, folder), Heard()
    callback = instantiate(node, [OURS, OF_LIGHTNING])
    best = Best(folder / "best", "best", "val_loss")
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[callback, heard, best],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, module_kinds.Ordered())
    kept = torch.load(best.best_model_path, weights_only=False)
    return weights(kept), weights({"state_dict": module.state_dict()}), heard.losses


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "ema" else slow, id=n) for n in CALLBACKS])
def test_it_ends_as_in_plain_lightning_and_evaluate_finds_the_same(train, name, tmp_path, capsys):
    best, last, losses = plain(name, tmp_path / "plain")
    run = train(*command(name))
    assert [value for _, value in run.history("val_loss")] == losses
    assert same(weights(run.checkpoint("best")), best)
    if name not in AVERAGING:  # which change the weights once more, after the last checkpoint
        assert same(weights(run.checkpoint("last")), last)
    main("evaluate", [run.run.info.run_id, "--dir", str(tmp_path / "runs")])
    assert "the same to the bit" in capsys.readouterr().out


@slow
@pytest.mark.parametrize("name", CALLBACKS)
def test_stopped_in_an_epoch_and_continued_it_ends_in_the_same_bits(train, name, tmp_path):
    whole = train(*command(name))
    stop = f"+callbacks.stop={{_target_: module_kinds.Stop, epoch: 2, mark: {tmp_path / 'mark'}}}"
    with pytest.raises(RuntimeError, match="stopped here"):
        train(*command(name), stop)
    if name in REFUSED:
        with pytest.raises(BadInput, match="cannot be continued: .* start it anew"):
            train(*command(name), stop, "resume=auto")
        return
    continued = train(*command(name), stop, "resume=auto")
    assert continued.run.info.run_id != whole.run.info.run_id
    for which in ("best", "last"):
        assert same(weights(continued.checkpoint(which)), weights(whole.checkpoint(which)))
    assert continued.run.data.metrics.keys() == whole.run.data.metrics.keys()
    for key in whole.run.data.metrics:
        # of two equal points of one millisecond MLflow keeps one
        ours, theirs = (set(each.history(key)) for each in (continued, whole))
        if "Device" in key:
            ours, theirs = ({step for step, _ in each} for each in (ours, theirs))
        assert ours == theirs, key


@slow
def test_all_of_them_sweep(trainees, tmp_path):
    write_callbacks(tmp_path / "conf", tmp_path / "elsewhere")
    names = ",".join(name for name in CALLBACKS if name not in ("backbone", "finetuning"))
    swept = (*words("module_kinds.Plain"), f"callbacks={names}")
    assert sweep(trainees, tmp_path, *swept) == ["FINISHED"] * (len(CALLBACKS) - 2 + 1)
