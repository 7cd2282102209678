"""Multilayer perceptron for classification.

Shapes: `B` minibatch size, `...` an example's own shape, `F` its number of values, `K` classes.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from tracklight.models.supervised import Supervised

ACTIVATIONS = dict(relu=nn.ReLU, gelu=nn.GELU, silu=nn.SiLU, tanh=nn.Tanh, sigmoid=nn.Sigmoid)


class MLP(Supervised):
    """Linear layers with an activation and dropout between them, under cross-entropy.

    Args:
        in_features: Number of values of an example, `F`.
        out_features: Number of classes, `K`.
        hidden: Widths of the hidden layers; an empty list gives softmax regression.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        activation: relu, gelu, silu, tanh or sigmoid.
    """

    pure = True

    def __init__(
        self,
        in_features: int = 784,
        out_features: int = 10,
        hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
        activation: str = "relu",
    ):
        super().__init__()
        hidden = list(hidden)
        self.save_hyperparameters(logger=False)  # the config has them
        if activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"model.activation={activation} must be one of {allowed}")
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]  # (B, ...) -> (B, F)
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(widths[-1], out_features))
        self.layers = nn.Sequential(*layers)

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # (B, ...) -> logits (B, K)
        return self.layers(inputs)

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    @override
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean()}
