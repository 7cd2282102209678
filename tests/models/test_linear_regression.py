import numpy as np
import pytest
import torch

from tracklight.models.linear_regression import LinearRegression


def test_the_least_squares_solution_leaves_no_gap():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    design = np.column_stack([inputs.numpy(), np.ones(50)])
    solution = np.linalg.pinv(design) @ targets.numpy()  # normal equations' solution, (F + 1, T)

    model = LinearRegression(in_features=3, out_features=2).double()
    with torch.no_grad():
        model.linear.weight.copy_(torch.from_numpy(solution[:3].T))
        model.linear.bias.copy_(torch.from_numpy(solution[3]))
    reference = model.reference(inputs, targets)

    assert reference["ols/gap"] < 1e-12
    residual = targets.numpy() - design @ solution
    assert reference["ols/loss"] == pytest.approx((residual**2).mean(), rel=1e-12)


def test_the_gap_is_the_largest_error_over_the_largest_coefficient():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    model = LinearRegression(bias=False)
    torch.nn.init.constant_(model.linear.weight, 2.5)
    assert model.reference(x, 2 * x)["ols/gap"] == pytest.approx(0.25, rel=1e-12)


def test_the_loss_is_the_mean_square_over_all_targets():
    outputs, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    assert LinearRegression().loss(outputs, targets).item() == (1 + 4) / 2
