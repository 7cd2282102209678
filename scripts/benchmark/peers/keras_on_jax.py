"""Keras on JAX: `fit`, 32 steps an execution. `python keras_on_jax.py FOLDER_OF_MNIST_RAW EPOCHS`."""

import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
from mnist import EPOCHS, Lines, load

(images, labels), test = load()
lines = Lines()
keras.utils.set_random_seed(0)


def dense(above: int, below: int, activation: str | None = None) -> keras.layers.Dense:
    """Return a layer that starts as PyTorch's Linear does, so that the losses are comparable."""
    draw = keras.initializers.RandomUniform(-(above**-0.5), above**-0.5)
    return keras.layers.Dense(below, activation, kernel_initializer=draw, bias_initializer=draw.clone())


model = keras.Sequential([keras.Input((784,)), dense(784, 128, "relu"), dense(128, 10)])
model.compile(
    optimizer=keras.optimizers.SGD(0.01),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile=True,
    steps_per_execution=32,
)
each = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: lines.end_epoch(logs["loss"]))
model.fit(images, labels, batch_size=64, epochs=EPOCHS, verbose=0, callbacks=[each])
answers = model.predict(test[0], batch_size=1000, verbose=0).argmax(1)
lines.end((answers == test[1]).mean())
