import numpy as np
import pytest
import torch

from tracklight.data.line import Line
from tracklight.errors import BadInput

DEFAULTS = {
    "batch_size": None,
    "seed": 0,
    "slope": 2.0,
    "intercept": 0.0,
    "noise": 0.0,
    "num_points": 4,
    "num_features": 1,
}


def line(**changes) -> Line:
    return Line(**DEFAULTS | changes)


def points(**changes) -> tuple[torch.Tensor, torch.Tensor]:
    train = line(**changes).splits["train"]
    return train.features, train.targets


def test_the_default_is_the_four_points_of_y_is_2x():
    data = line()
    assert list(data.splits) == ["train"]
    [(x, y)] = data.train_dataloader()
    assert torch.equal(x, torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert torch.equal(y, torch.tensor([[2.0], [4.0], [6.0], [8.0]]))
    assert x.dtype == y.dtype == torch.float32
    assert (data.name, data.in_features, data.out_features) == ("line", 1, 1)


def test_each_coordinate_is_the_float32_nearest_to_the_line():
    x, y = points(slope=0.1, intercept=0.3, num_points=1000)
    expected = [np.float32(0.1 * i + 0.3) for i in range(1, 1001)]
    assert y[:, 0].tolist() == expected
    assert x[:, 0].tolist() == list(range(1, 1001))


def test_slope_and_intercept_are_found_again_under_noise():
    x, y = points(slope=-3.0, intercept=5.0, noise=0.5, num_points=2000, num_features=3)
    design = np.hstack([x.double().numpy(), np.ones((len(x), 1))])
    found, [squares], *_ = np.linalg.lstsq(design, y.double().numpy(), rcond=None)
    error = 0.5 * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    assert (np.abs(found[:, 0] - [-3, -3, -3, 5]) < 5 * error).all()  # five standard errors
    assert np.sqrt(squares / 1996) == pytest.approx(0.5, rel=0.1)  # six standard errors


def test_the_seed_decides_what_is_drawn_and_nothing_else_does():
    noisy = {"noise": 1.0, "num_features": 2}
    first = line(**noisy).digest
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert line(**noisy).digest == first
    assert line(**noisy, seed=1).digest != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_points", 0),
        ("num_points", 2.5),
        ("num_points", True),
        ("num_features", -1),
        ("noise", -0.1),
        ("noise", float("nan")),
        ("slope", float("inf")),
        ("slope", "steep"),
        ("intercept", None),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_fix(key, value):
    with pytest.raises(BadInput, match=rf"data\.{key}={value} must .* try data\.{key}="):
        line(**{key: value})
