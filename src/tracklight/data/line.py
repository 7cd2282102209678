"""Points on a line, or on a plane: the smallest regression there is, generated on the spot.

Shapes: `N` points, `F` features.
"""

import math

import torch

from tracklight.data.tensor_data import Split, TensorData, split_rows


class Line(TensorData):
    """y = slope * (x_1 + ... + x_F) + intercept + noise, as a training part alone unless there are folds.

    The first feature counts 1, 2, ..., N; further ones are drawn from the standard normal distribution. Both
    they and the noise follow from the seed. `noise` is the standard deviation of the noise on y, 0 or more.
    `conf/data/line.yaml` describes the other arguments.
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
        fold: int = 0,
        num_folds: int = 0,
    ):
        super().__init__(batch_size, seed, fold, num_folds)
        for key, count in (("num_points", num_points), ("num_features", num_features)):
            is_count = type(count) is int and count >= 1
            self.check_argument(key, count, is_count, "a whole number above 0", 4)
        for key, value in (("slope", slope), ("intercept", intercept), ("noise", noise)):
            is_finite = type(value) in (int, float) and math.isfinite(value)
            self.check_argument(key, value, is_finite, "a finite number", 0)
        self.check_argument("noise", noise, noise >= 0, "0 or more (a standard deviation)", 0)
        self.slope = slope
        self.intercept = intercept
        self.noise = noise
        self.num_points = num_points
        self.in_features = num_features
        names = [f"x{i + 1}" for i in range(num_features)]
        self.feature_names = names if num_features > 1 else ["x"]
        self.source = f"y = {slope:g} x + {intercept:g}, noise {noise:g}"

    def load(self) -> dict[str, Split]:
        """Generate x (N, F) and y (N, 1); computed in float64, rounded once."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.num_points, self.in_features, dtype=torch.float64, generator=generator)
        x[:, 0] = torch.arange(1, self.num_points + 1)
        y = self.slope * x.sum(dim=1, keepdim=True) + self.intercept
        if self.noise:
            y += self.noise * torch.randn(y.shape, dtype=torch.float64, generator=generator)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        rows = split_rows(order, 0, 0, self.fold, self.num_folds)
        return {name: Split(x[part].to(self.dtype), y[part].to(self.dtype)) for name, part in rows.items()}
