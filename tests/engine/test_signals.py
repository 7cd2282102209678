"""Signals stop a training at safe points; this process sends them to itself."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from foreign import Blobs
from tracklight.engine.blocks import Blocks
from tracklight.engine.signals import SafeStop, Stopped, requeue_signal, stop_signals
from tracklight.models.mlp import MLP


class Strike(Callback):
    """Sends a signal at the n-th call of a hook, and goes on for a line."""

    def __init__(self, hook: str, call: int, signum: signal.Signals):
        self.calls, self.went_on = 0, False

        def strike(*_, **__) -> None:
            self.calls += 1
            if self.calls == call:
                os.kill(os.getpid(), signum)
                self.went_on = True

        setattr(self, hook, strike)


def fit(stop: SafeStop, *callbacks: Callback) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[Blocks(0), stop, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLP(8, 4, hidden=[4]), datamodule=Blobs(16, 0))
    return trainer


HOOKS = [
    ("on_fit_start", 1),
    ("on_train_epoch_start", 2),
    ("on_train_batch_start", 2),
    ("on_train_batch_end", 2),
    ("on_validation_batch_end", 1),
    ("on_train_epoch_end", 1),
]


@pytest.mark.parametrize(
    ("hook", "call", "signum"),
    [
        *((*hook, signal.SIGTERM) for hook in HOOKS),
        *((*HOOKS[3], signum) for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_a_signal_in_training_stops_it_once_the_hook_is_done(hook, call, signum):
    with SafeStop().listening() as stop:
        strike = Strike(hook, call, signum)
        with pytest.raises(Stopped) as caught, stop.converting_errors():
            fit(stop, strike)
    assert (caught.value.signum, strike.went_on) == (signum, True)
    assert strike.calls <= call + 1


@pytest.fixture
def submitted(monkeypatch):
    """As in a job of submitit, which has a handler for SIGUSR2; the signals that this one got."""
    got = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR2, lambda signum, _: got.append(signum))
    yield got
    signal.signal(signal.SIGUSR2, before)


def test_in_a_job_of_submitit_sigterm_and_sigusr2_stop_at_a_safe_point(submitted):
    with SafeStop().listening() as stop:
        strikes = Strike("on_train_batch_start", 2, signal.SIGTERM), Strike(*HOOKS[3], signal.SIGUSR2)
        with pytest.raises(Stopped) as caught, stop.converting_errors():
            fit(stop, *strikes)
        assert caught.value.signum == signal.SIGUSR2 and all(strike.went_on for strike in strikes)
    assert submitted == []
    os.kill(os.getpid(), requeue_signal())  # after the run, submitit's handler is there again
    assert submitted == [signal.SIGUSR2]


def test_without_a_handler_of_submitits_sigusr2_is_left_alone(monkeypatch):
    assert requeue_signal() is None and signal.SIGUSR2 not in stop_signals()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert requeue_signal() is None and signal.SIGUSR2 not in stop_signals()


def test_a_signal_outside_of_training_stops_at_once():
    with pytest.raises(Stopped) as caught, SafeStop().listening():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert caught.value.signum == signal.SIGTERM


def test_after_training_a_signal_stops_at_once_again():
    with SafeStop().listening() as stop:
        fit(stop)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_from_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with SafeStop().listening() as stop:
        fit(stop)
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("error", [RuntimeError("a worker died"), SIGTERMException()])
def test_what_a_signal_makes_others_raise_is_the_signal(error):
    stop = SafeStop()
    stop.received = signal.SIGTERM
    with pytest.raises(Stopped) as caught, stop.converting_errors():
        raise error
    assert caught.value.signum == signal.SIGTERM


def test_an_error_without_a_signal_stays_itself():
    with pytest.raises(RuntimeError, match="mine"), SafeStop().converting_errors():
        raise RuntimeError("mine")


def test_sigterm_that_another_process_got_ends_this_one_too():
    with pytest.raises(Stopped), SafeStop().converting_errors():
        raise SIGTERMException


WAITING = """
    import os, signal, subprocess, sys, time
    import pytorch_lightning, torch  # before the clock runs
    from torch.distributed import TCPStore
    from tracklight.engine import signals

    signals.STUCK_S = 1.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(signal.SIGSTOP)
    with signals.SafeStop().listening() as stop:
        stop.has_company = {company}
        print(child.pid, flush=True)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.wait(["never set"])  # in C++, where no handler runs
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("company", "signals"),
    [(True, [signal.SIGTERM]), (True, [signal.SIGINT]), (False, [signal.SIGINT, signal.SIGINT])],
)
def test_a_signal_ends_a_wait_inside_of_pytorch_and_the_processes_below(company, signals):
    """One is enough where others are waited for; elsewhere the second, as ever, leaves at once."""
    program = textwrap.dedent(WAITING.format(company=company))
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as process:
        child = int(process.stdout.readline())
        for number in signals:
            time.sleep(0.2)
            process.send_signal(number)
        assert process.wait(30) == 128 + signals[-1]
        assert process.stderr.read().count("\n") == 1
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_signal_of_a_forked_process_is_not_taken_for_one_of_this():
    """Python writes the number of a signal to the pipe for which this asks; a fork shares it."""
    with SafeStop().listening():
        pid = os.fork()
        if pid == 0:
            os._exit(signal.set_wakeup_fd(-1) + 1)
        assert os.waitpid(pid, 0)[1] == 0
