"""scikit-learn's MLPClassifier, plain SGD. `python scikit_learn.py FOLDER_OF_MNIST_RAW EPOCHS`."""

from mnist import EPOCHS, Lines, load
from sklearn.neural_network import MLPClassifier

(images, labels), test = load()
lines = Lines()
net = MLPClassifier(
    (128,), solver="sgd", learning_rate_init=0.01, momentum=0.0, alpha=0.0, batch_size=64, random_state=0
)
for _ in range(EPOCHS):
    net.partial_fit(images, labels, classes=range(10))
    lines.end_epoch(net.loss_)
lines.end(net.score(*test))
