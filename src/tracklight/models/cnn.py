"""Convolutional network for classification of images.

Shapes: `B` minibatch size, `C` channels, `H` and `W` an image's height and width, `K` classes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from tracklight.models.supervised import Supervised


class CNN(Supervised):
    """Blocks of convolution, ReLU and pooling, and two linear layers, under cross-entropy.

    Args:
        image_shape: Shape of an image, (`C`, `H`, `W`).
        out_features: Number of classes, `K`.
        channels: Number of channels of each block, whose pooling halves height and width.
        kernel_size: Side of the kernels, an odd number of pixels.
        width: Width of the hidden linear layer.
        dropout: Probability of dropping a hidden unit, in [0, 1).
    """

    pure = True

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        out_features: int = 10,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        width: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__()
        image_shape, channels = list(image_shape), list(channels)
        self.save_hyperparameters(logger=False)  # the config has them
        num_channels = [image_shape[0], *channels]
        sides = [side // 2 ** len(channels) for side in image_shape[1:]]
        if 0 in sides:
            raise ValueError(f"model.channels={channels}: so many halvings leave no pixel of {image_shape}")
        layers: list[nn.Module] = []
        for channels_in, channels_out in pairwise(num_channels):  # (B, C, H, W) -> (B, C', H // 2, W // 2)
            layers.append(nn.Conv2d(channels_in, channels_out, kernel_size, padding="same"))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(num_channels[-1] * math.prod(sides), width), nn.ReLU()]
        layers += [nn.Dropout(dropout), nn.Linear(width, out_features)]
        self.layers = nn.Sequential(*layers)

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # (B, C, H, W) -> logits (B, K)
        return self.layers(inputs)

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    @override
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean()}
