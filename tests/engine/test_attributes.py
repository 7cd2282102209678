"""What other people's objects remember beside weights goes on in a resumed run."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from pytorch_lightning import Callback
from test_resumed_epochs import EPOCHS, tail, thrice
from torchmetrics import MaxMetric, MeanMetric, MetricCollection

from foreign_loaders import Loaders, Restless
from tracklight.engine.attributes import AttributeKeeper

__all__ = ["thrice"]  # a fixture
numbers = partial(Loaders, "in_process")


class Counting(Restless):
    """Remembers in attributes and in metrics what no checkpoint of Lightning holds."""

    def __init__(self):
        super().__init__()
        self.rate, self.pair, self.best, self.history = 1.0, (0, "a"), np.inf, []
        self.centre, self.last = torch.zeros(2), None
        self.highest, self.means = MaxMetric(), MetricCollection({"a": MeanMetric(), "b": MeanMetric()})

    def on_train_start(self):
        super().on_train_start()
        self.highest.reset()  # as the template for Lightning and Hydra does

    def training_step(self, batch, batch_idx):
        self.last = super().training_step(batch, batch_idx)  # with its graph
        return self.last * self.rate

    def on_train_epoch_end(self):
        epoch = self.current_epoch + 1
        self.rate, self.pair = 0.5 * self.rate, (epoch, "a")
        self.history.append({"epoch": epoch, "loss": np.float64(self.last.item())})
        self.centre = self.centre + epoch
        self.best = min(self.best, np.float64(100 - epoch))
        self.means.update(float(epoch))
        self.log_dict({f"mean_{key}": value for key, value in self.means.compute().items()})
        self.log_dict({"rate": self.rate, "pair": float(self.pair[0]), "rows": float(len(self.history))})
        self.log_dict({"centre": self.centre[1], "best": float(self.best)})

    def on_validation_epoch_end(self):
        self.highest(float(10 if self.current_epoch == 0 else 0))
        self.log("highest", self.highest.compute())


class Counter(Callback):
    def __init__(self):
        self.epochs = 0

    def on_train_epoch_end(self, trainer, module):
        self.epochs += 1
        module.log("epochs", float(self.epochs))


def test_attributes_and_metrics_go_on_where_they_were(thrice):
    whole, continued, begun = thrice(Counting, numbers, AttributeKeeper, Counter)
    logged = {key: [value for _, value in tail(continued, key, begun)] for key in continued.logger.points}
    count = [float(epoch) for epoch in range(1, EPOCHS + 1)][-len(logged["epochs"]) :]
    assert 0 < len(count) < EPOCHS
    assert logged["epochs"] == logged["pair"] == logged["rows"] == count
    assert logged["rate"] == [0.5**epoch for epoch in count]
    assert logged["best"] == [100 - epoch for epoch in count]
    assert logged["centre"] == [epoch * (epoch + 1) / 2 for epoch in count]
    assert logged["mean_a"] == logged["mean_b"] == [(epoch + 1) / 2 for epoch in count]
    assert logged["highest"] == [10.0] * len(count)
    assert tail(continued, "train_loss", begun) == tail(whole, "train_loss", begun)
    assert continued.same_bits(whole)


def test_what_training_did_not_change_is_what_the_module_is_made_with():
    trainer = SimpleNamespace(world_size=1, callbacks=[], datamodule=None)
    keeper, module = AttributeKeeper(), Counting()
    keeper.on_train_epoch_start(trainer, module)
    module.rate = 0.25
    state = keeper.state_dict()
    assert state == {"module": {"rate": 0.25}}  # not `best`, say, which a changed config may have changed
    again = AttributeKeeper()
    again.load_state_dict({**state})
    other = Counting()
    other.scale = 3.0
    again.on_train_epoch_start(trainer, other)
    assert (other.rate, other.scale) == (0.25, 3.0)
    assert again.state_dict() == state  # a second stop, before it changes once more
