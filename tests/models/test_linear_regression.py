import math

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


NORRIS = """
0.1 0.2 338.8 337.4 118.1 118.2 888.0 884.6 9.2 10.1 228.1 226.5 668.5 666.3 998.5 996.3 449.1 448.6
778.9 777.0 559.2 558.2 0.3 0.4 0.1 0.6 778.1 775.5 668.8 666.9 339.3 338.0 448.9 447.5 10.8 11.6
557.7 556.0 228.3 228.1 998.0 995.8 888.8 887.6 119.6 120.2 0.3 0.3 0.6 0.3 557.6 556.8 339.3 339.1
888.0 887.2 998.5 999.0 778.9 779.0 10.2 11.1 117.6 118.3 228.9 229.2 668.4 669.1 449.2 448.9 0.2 0.5"""
LONGLEY = """
60323 83.0 234289 2356 1590 107608 1947 61122 88.5 259426 2325 1456 108632 1948
60171 88.2 258054 3682 1616 109773 1949 61187 89.5 284599 3351 1650 110929 1950
63221 96.2 328975 2099 3099 112075 1951 63639 98.1 346999 1932 3594 113270 1952
64989 99.0 365385 1870 3547 115094 1953 63761 100.0 363112 3578 3350 116219 1954
66019 101.2 397469 2904 3048 117388 1955 67857 104.6 419180 2822 2857 118734 1956
68169 108.4 442769 2936 2798 120445 1957 66513 110.8 444546 4681 2637 121950 1958
68655 112.6 482704 3813 2552 123366 1959 69564 114.2 502601 3931 2514 125368 1960
69331 115.7 518173 4806 2572 127852 1961 70551 116.9 554894 4007 2827 130081 1962"""


def numbers(text: str, num_columns: int) -> list[list[float]]:
    values = [float(word) for word in text.split()]
    return [values[at : at + num_columns] for at in range(0, len(values), num_columns)]


def wampler(ratio: float) -> list[list[float]]:
    powers = [[float(x**k) for k in range(6)] for x in range(21)]
    return [[sum(ratio**k * p for k, p in enumerate(row)), *row[1:]] for row in powers]


@pytest.mark.parametrize(
    ("rows", "certified", "squares", "digits"),
    [
        (numbers(NORRIS, 2), [-0.262323073774029, 1.00211681802045], 26.6173985294224, 12),
        (
            numbers(LONGLEY, 7),
            [-3482258.63459582, 15.0618722713733, -0.358191792925910e-01, -2.02022980381683]
            + [-1.03322686717359, -0.511041056535807e-01, 1829.15146461355],
            836424.055505915,
            10,
        ),
        (wampler(1.0), [1.0] * 6, 0.0, 9),
        (wampler(0.1), [0.1**k for k in range(6)], 0.0, 9),
    ],
    ids=["Norris", "Longley", "Wampler1", "Wampler2"],
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
