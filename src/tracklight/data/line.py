"""Points on a line, or on a plane: the smallest regression there is, made on the spot.

Shapes: `N` points, `F` features.
"""

import math

import torch

from tracklight.data.tensor_data import Split, TensorData
from tracklight.errors import BadInput


class Line(TensorData):
    """y = slope * (x_1 + ... + x_F) + intercept + noise, as a training part alone.

    The first feature counts 1, 2, ..., N; further ones are drawn from the standard normal
    distribution.

    Args:
        batch_size: Points in a minibatch; None takes all of them in their order.
        seed: Seed of the drawn features, the noise and the epochs' orders.
        slope: Weight of every feature.
        intercept: Value at the origin.
        noise: Standard deviation of the normal noise on y, 0 or more.
        num_points: `N`, 1 or more.
        num_features: `F`, 1 or more.

    Raises:
        BadInput: A value is out of its range.
    """

    name = "line"
    out_features = 1

    def __init__(
        self,
        batch_size: int | None,
        seed: int,
        slope: float,
        intercept: float,
        noise: float,
        num_points: int,
        num_features: int,
    ):
        super().__init__(batch_size, seed)
        for key, count, example in (
            ("num_points", num_points, 4),
            ("num_features", num_features, 1),
        ):
            if type(count) is not int or count < 1:
                raise BadInput(
                    f"data.{key}={count} must be a whole number above 0; try data.{key}={example}"
                )
        for key, value in (("slope", slope), ("intercept", intercept), ("noise", noise)):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise BadInput(f"data.{key}={value} must be a finite number; try data.{key}=0")
        if noise < 0:
            raise BadInput(
                f"data.noise={noise} must not be negative (a standard deviation); try data.noise=0"
            )
        self.slope = slope
        self.intercept = intercept
        self.noise = noise
        self.num_points = num_points
        self.in_features = num_features
        self.feature_names = (
            [f"x{i + 1}" for i in range(num_features)] if num_features > 1 else ["x"]
        )
        self.source = f"y = {slope:g} x + {intercept:g}, noise {noise:g}"

    def load(self) -> dict[str, Split]:
        """Make the points: x (N, F) and y (N, 1), float32; computed in float64, rounded once."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.num_points, self.in_features, dtype=torch.float64, generator=generator)
        x[:, 0] = torch.arange(1, self.num_points + 1)
        y = self.slope * x.sum(dim=1, keepdim=True) + self.intercept
        if self.noise:
            y += self.noise * torch.randn(y.shape, dtype=torch.float64, generator=generator)
        return {"train": Split(x.float(), y.float())}
