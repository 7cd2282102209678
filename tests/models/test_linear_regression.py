import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tracklight.data.table import Table
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


NIST = Path(__file__).parents[2] / "docs/nist"


def table(name: str) -> list[list[float]]:
    """Rows of NIST's data set: the target, then the regressors."""
    lines = (NIST / f"{name}.csv").read_text().splitlines()[1:]
    return [[float(cell) for cell in line.split(",")] for line in lines]


def powers(rows: list[list[float]], degree: int) -> list[list[float]]:
    """Of a target and one regressor: the target and the regressor's powers."""
    return [[y, *(x**k for k in range(1, degree + 1))] for y, x in rows]


def wampler(ratio: float) -> list[list[float]]:
    return powers([[sum((ratio * x) ** k for k in range(6)), float(x)] for x in range(21)], 5)


@pytest.mark.parametrize(
    ("rows", "certified", "squares", "digits"),
    [
        (table("norris"), [-0.262323073774029, 1.00211681802045], 26.6173985294224, 12),
        (
            table("longley"),
            [-3482258.63459582, 15.0618722713733, -0.358191792925910e-01, -2.02022980381683]
            + [-1.03322686717359, -0.511041056535807e-01, 1829.15146461355],
            836424.055505915,
            10,
        ),
        (  # the condition of its columns is 2e15: eight digits are what double precision has
            powers(table("filip"), 10),
            [-1467.48961422980, -2772.17959193342, -2316.37108160893, -1127.97394098372, -354.478233703349]
            + [-75.1242017393757, -10.8753180355343, -1.06221498588947, -0.670191154593408e-01]
            + [-0.246781078275479e-02, -0.402962525080404e-04],
            0.795851382172941e-03,
            7,
        ),
        (wampler(1.0), [1.0] * 6, 0.0, 9),
        (wampler(0.1), [0.1**k for k in range(6)], 0.0, 9),
    ],
    ids=["Norris", "Longley", "Filip", "Wampler1", "Wampler2"],
)
def test_least_squares_has_the_certified_digits_of_nists_reference_data(
    tmp_path, rows, certified, squares, digits
):
    """NIST's Statistical Reference Datasets, linear regression; coefficients by rising power or column."""
    names = [f"x{i}" for i in range(1, len(rows[0]))]
    lines = [",".join(["y", *names]), *(",".join(map(repr, row)) for row in rows)]
    (tmp_path / "nist.csv").write_text("\n".join(lines) + "\n")
    data = Table(None, 0, str(tmp_path / "nist.csv"), "y", None, 0, 0, True, ",")
    data.dtype = torch.float64
    train = data.splits["train"]
    model = LinearRegression(len(names), 1).double()
    intercept, *slopes = certified
    scaled = [slope * std for slope, std in zip(slopes, data.std, strict=True)]  # columns are standardised
    at_mean = math.fsum([intercept, *(s * mean for s, mean in zip(slopes, data.mean, strict=True))])
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([scaled], dtype=torch.float64))
        model.linear.bias.copy_(torch.tensor([at_mean], dtype=torch.float64))
    found = model.reference(train.features, train.targets)
    assert found["ols/gap"] < 10.0**-digits
    scale = sum(row[0] ** 2 for row in rows)
    assert found["ols/loss"] * len(rows) == pytest.approx(squares, rel=10.0**-digits, abs=1e-20 * scale)
