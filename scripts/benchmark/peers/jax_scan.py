"""JAX: an epoch is one compiled scan over its minibatches. `python jax_scan.py FOLDER_OF_MNIST_RAW EPOCHS`.

Shapes: `N` images, `P` pixels, `S` steps an epoch, `B` images in a minibatch.
"""

from functools import partial

import jax
import jax.numpy as jnp
from mnist import EPOCHS, Lines, load

BATCH_SIZE, LEARNING_RATE = 64, 0.01
Params = list[tuple[jax.Array, jax.Array]]


def make_params(key: jax.Array) -> Params:
    """Draw weights and biases as PyTorch's Linear does, so that the losses are comparable."""
    params = []
    for above, below in ((784, 128), (128, 10)):
        key, of_weights, of_biases = jax.random.split(key, 3)
        limit = above**-0.5
        draw = partial(jax.random.uniform, minval=-limit, maxval=limit)
        params.append((draw(of_weights, (above, below)), draw(of_biases, (below,))))
    return params


def forward(params: Params, images: jax.Array) -> jax.Array:
    """Return the logits (B, 10) of images (B, P)."""
    (w1, b1), (w2, b2) = params
    return jax.nn.relu(images @ w1 + b1) @ w2 + b2


def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    log_p = jax.nn.log_softmax(forward(params, images))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


@jax.jit
def train_epoch(
    params: Params, key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[Params, jax.Array]:
    """Take the steps of an epoch on images (N, P); those left over from the last whole minibatch wait."""
    steps = len(images) // BATCH_SIZE
    rows = jax.random.permutation(key, len(images))[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)  # (S, B)

    def step(params: Params, rows: jax.Array) -> tuple[Params, jax.Array]:
        loss, slopes = jax.value_and_grad(loss_of)(params, images[rows], labels[rows])
        return jax.tree.map(lambda value, slope: value - LEARNING_RATE * slope, params, slopes), loss

    params, losses = jax.lax.scan(step, params, rows)
    return params, losses.mean()


@jax.jit
def accuracy_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of right answers."""
    return (forward(params, images).argmax(1) == labels).mean()


train, test = load()
images, labels = map(jnp.asarray, train)
key, first = jax.random.split(jax.random.key(0))
params = make_params(first)
lines = Lines()
for _ in range(EPOCHS):
    key, order = jax.random.split(key)
    params, loss = train_epoch(params, order, images, labels)
    lines.end_epoch(float(loss))
lines.end(float(accuracy_of(params, *map(jnp.asarray, test))))
