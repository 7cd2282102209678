"""skorch: scikit-learn's interface around PyTorch. `python skorch_net.py FOLDER_OF_MNIST_RAW EPOCHS`."""

import torch
from mnist import EPOCHS, Lines, load
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn


class Each(Callback):
    """Prints a line an epoch."""

    def on_epoch_end(self, net: NeuralNetClassifier, **others) -> None:
        """Print it."""
        lines.end_epoch(net.history[-1, "train_loss"])


train, test = load()
lines = Lines()
torch.manual_seed(0)
net = NeuralNetClassifier(
    nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.SGD,
    lr=0.01,
    batch_size=64,
    max_epochs=EPOCHS,
    iterator_train__shuffle=True,
    iterator_valid__batch_size=1000,
    train_split=None,
    verbose=0,
    callbacks=[Each()],
)
net.fit(*train)
lines.end(net.score(*test))
