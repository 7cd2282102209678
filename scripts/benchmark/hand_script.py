"""Five epochs by hand: `python hand_script.py FOLDER_OF_MNIST_RAW`. Nothing is tracked.

It imports what the framework stands on, so that a comparison of whole processes is one of what is
done with it, and trains on the rows that `python train.py model=mlp` trains on, as many at least.
"""

import sys
from pathlib import Path

import mlflow  # noqa: F401
import pytorch_lightning  # noqa: F401
import torch
from torch import nn
from torch.nn import functional

NUM_TRAIN = 55_000  # of 60,000: train.py keeps the rest for validation
EPOCHS = 5

raw = Path(sys.argv[1]) / "MNIST" / "raw"
pixels = bytearray((raw / "train-images-idx3-ubyte").read_bytes())
images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16).view(-1, 28, 28)[:NUM_TRAIN]
digits = bytearray((raw / "train-labels-idx1-ubyte").read_bytes())
labels = torch.frombuffer(digits, dtype=torch.uint8, offset=8)[:NUM_TRAIN].long()

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for epoch in range(EPOCHS):
    for rows in torch.randperm(NUM_TRAIN).split(64):
        inputs = (images[rows].float() / 255 - 0.1307) / 0.3081
        loss = functional.cross_entropy(model(inputs), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}/{EPOCHS}")
