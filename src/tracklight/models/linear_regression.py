"""Linear regression, trained by gradient descent and compared with the least-squares solution.

Shapes: `B` minibatch size, `N` training examples, `F` features, `T` targets.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from tracklight.models.supervised import Supervised


class LinearRegression(Supervised):
    """One linear layer under the mean squared error.

    Args:
        in_features: Number of features, `F`.
        out_features: Number of targets, `T`.
        bias: Whether the layer has an intercept.
    """

    pure = True

    def __init__(self, in_features: int = 1, out_features: int = 1, bias: bool = True):
        super().__init__()
        self.save_hyperparameters(logger=False)  # the config has them
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # (B, F) -> (B, T)
        return self.linear(inputs)

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets)

    def reference(self, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compare the trained layer with the least-squares solution.

        Args:
            inputs: Training inputs (N, F), standardised as in training.
            targets: Training targets (N, T).

        Returns:
            `ols/loss`, the least mean squared error of any such layer on these examples, and
            `ols/gap`, the largest difference between a parameter and its least-squares
            value, divided by the largest such value.

        Source: minimum-norm least squares by singular value decomposition (LAPACK gelsd), in
        float64.
        """
        x, y = inputs.cpu().double(), targets.cpu().double()
        trained = self.linear.weight.detach().cpu().double().T  # (F, T)
        if self.linear.bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # (N, F + 1)
            trained = torch.cat([trained, self.linear.bias.detach().cpu().double()[None]])
        solution = torch.linalg.lstsq(x, y, driver="gelsd").solution
        gap = (trained - solution).abs().max() / solution.abs().max()
        return {"ols/loss": functional.mse_loss(x @ solution, y).item(), "ols/gap": gap.item()}
