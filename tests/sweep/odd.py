"""OptunaStudy that misbehave in one way each."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

from foreign import Blobs
from tracklight.data.tensor_data import Split
from tracklight.models.linear_regression import LinearRegression
from tracklight.models.mlp import MLP


class Odd(LinearRegression):
    """Fits a line; in the epoch `at`, does what its mood says."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mood: str = "good",
        at: int = 2,
        seconds: float = 0.0,
        only_once: str | None = None,
    ):
        if mood == "refuses":
            raise ValueError("this mood is refused by the constructor")
        super().__init__(in_features, out_features, bias)
        self.mood, self.at, self.seconds = mood, at, seconds
        self.only_once = only_once

    def on_train_epoch_start(self) -> None:
        time.sleep(self.seconds)
        if self.mood == "good" or self.current_epoch != self.at or self._was_here():
            return
        if self.mood == "raises":
            raise ArithmeticError("in a bad mood")
        if self.mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mood == "exits":
            os._exit(3)

    def on_train_epoch_end(self) -> None:
        if self.mood != "quiet":
            self.log("odd/mood", float(self.current_epoch))

    def _was_here(self) -> bool:
        if self.only_once is None:
            return False
        mark = Path(self.only_once)
        if mark.exists():
            return True
        mark.touch()
        return False


class Told(Callback):
    """Counts the epochs that all trials run, in a file that grows by a byte each."""

    def __init__(self, path: str):
        self.path = path

    def on_train_epoch_end(self, *_: Any) -> None:
        with Path(self.path).open("a") as file:
            file.write(".")


class Untestable(MLP):
    """Trains well, and fails on the test set."""

    def on_test_start(self) -> None:
        raise ArithmeticError("no test for me")


class Lingering(MLP):
    """Takes its time over the test set."""

    def on_test_start(self) -> None:
        print("lingers", flush=True)
        time.sleep(1.0)


class Kept(Blobs):
    """`Blobs` whose first label is what a file says."""

    def __init__(self, path: str, batch_size: int | None, seed: int, num_val: int = 64):
        super().__init__(batch_size, seed, num_val=num_val)
        self.path = path

    def load(self) -> dict[str, Split]:
        splits = super().load()
        splits["train"].targets[0] = int(Path(self.path).read_text())
        return splits
