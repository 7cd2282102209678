"""Signals stop a training at safe points; this process sends them to itself."""

import os
import signal

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from foreign import Blobs
from tracklight.engine.blocks import Blocks
from tracklight.engine.signals import SafeStop, Stopped
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
        callbacks=[Blocks(0, report=lambda _: None), stop, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLP(8, 4, hidden=[4]), datamodule=Blobs(16, 0))
    return trainer


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_fit_start", 1),
        ("on_train_epoch_start", 2),
        ("on_train_batch_start", 2),
        ("on_train_batch_end", 2),
        ("on_validation_batch_end", 1),
        ("on_train_epoch_end", 1),
    ],
)
def test_a_signal_in_training_stops_it_once_the_hook_is_done(hook, call, signum):
    with SafeStop().listening() as stop:
        strike = Strike(hook, call, signum)
        with pytest.raises(Stopped) as caught, stop.converting_errors():
            fit(stop, strike)
    assert (caught.value.signum, strike.went_on) == (signum, True)
    assert strike.calls <= call + 1


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
