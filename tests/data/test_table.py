from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import StandardScaler

from tracklight.data.table import Table
from tracklight.errors import BadInput

DEFAULTS = {
    "batch_size": 32,
    "seed": 0,
    "path": None,
    "target": None,
    "features": None,
    "num_val": 0.15,
    "num_test": 0.15,
    "standardise": True,
    "delimiter": ",",
}


def table(**changes) -> Table:
    return Table(**DEFAULTS | changes)


@pytest.fixture
def numbered(tmp_path):
    """A table of 40 rows whose target is the row's number."""
    raw = np.random.default_rng(0).normal(50, 20, (40, 3))
    lines = [",".join(map(repr, [*row.tolist(), i])) for i, row in enumerate(raw)]
    path = tmp_path / "numbered.csv"
    path.write_text("\n".join(["a,b,c,row", *lines]))
    return raw, {"path": str(path), "target": "row"}


def rows_of(data: Table) -> dict[str, list[int]]:
    return {name: split.targets[:, 0].int().tolist() for name, split in data.splits.items()}


def test_every_row_is_in_exactly_one_part(numbered):
    parts = rows_of(table(**numbered[1]))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 28, "val": 6, "test": 6}
    assert sorted(sum(parts.values(), [])) == list(range(40))


def test_the_seed_alone_decides_the_split(numbered):
    _, args = numbered
    first = rows_of(table(**args))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert rows_of(table(**args)) == first
    assert rows_of(table(**args, seed=1)) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_test_rows_do_not_depend_on_the_validation_part(numbered):
    _, args = numbered
    assert rows_of(table(**args, num_val=0))["test"] == rows_of(table(**args, num_val=20))["test"]


def test_counts_and_fractions_size_the_parts(numbered):
    _, args = numbered
    parts = rows_of(table(**args, num_val=11, num_test=0))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 29, "val": 11}
    parts = rows_of(table(**args, num_val=0.001, num_test=0.25))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 29, "val": 1, "test": 10}


def test_features_are_standardised_by_the_training_part_alone(numbered):
    raw, args = numbered
    data = table(**args)
    rows = rows_of(data)
    scaler = StandardScaler().fit(raw[rows["train"]])
    for name, split in data.splits.items():
        expected = scaler.transform(raw[rows[name]]).astype(np.float32)
        np.testing.assert_allclose(split.features, expected, rtol=1e-6, atol=1e-7)  # float32
        assert split.features.dtype == split.targets.dtype == torch.float32


def test_a_large_offset_costs_no_precision(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("t,y\n" + "".join(f"{1_700_000_000 + i},{i}\n" for i in range(20)))
    train = table(path=str(path), target="y", num_val=0, num_test=0).splits["train"]
    expected = (np.arange(20) - 9.5) / np.sqrt((20**2 - 1) / 12)  # moments of 0..19
    np.testing.assert_allclose(train.features[:, 0], expected, rtol=1e-6)  # float32


def test_without_standardising_the_numbers_stay_as_they_are(numbered):
    raw, args = numbered
    data = table(**args, standardise=False)
    rows = rows_of(data)
    for name, split in data.splits.items():
        assert np.array_equal(split.features, raw[rows[name]].astype(np.float32))


def test_several_targets_and_a_choice_of_features(numbered):
    _, args = numbered
    data = table(**args | {"target": ["row", "b"], "features": ["c"]})
    data.setup()
    assert (data.in_features, data.out_features, data.feature_names) == (1, 2, ["c"])
    assert data.splits["train"].targets.shape == (28, 2)


def test_the_builtin_table_is_the_diabetes_table():
    data = table(batch_size=None)
    splits = data.splits
    x, y = load_diabetes(return_X_y=True, scaled=False)
    assert (data.name, data.in_features, data.out_features) == ("diabetes", 10, 1)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 310,
        "val": 66,
        "test": 66,
    }
    targets = torch.cat([split.targets[:, 0] for split in splits.values()])
    assert sorted(targets.tolist()) == sorted(y.tolist())
    assert data.feature_names == ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
    everything = np.concatenate([split.features.numpy() for split in splits.values()])
    ranks = everything[:, 2].argsort(kind="stable").argsort(kind="stable")
    assert np.corrcoef(ranks, targets)[0, 1] > 0.5  # bmi still stands beside its target
    chosen = table(target="bp", features=["s1", "target"])
    chosen.setup()
    assert chosen.feature_names == ["s1", "target"]


def test_the_digest_is_of_the_numbers_and_sees_one_changed_bit(numbered):
    _, args = numbered
    path = Path(args["path"])
    text = path.read_text()
    first = table(**args).digest
    path.write_text(text, encoding="utf-16")
    assert table(**args).digest == first
    path.write_text(text.removesuffix("39") + "39.000004")
    assert table(**args).digest != first


def test_the_source_digest_is_of_the_whole_table_whatever_the_seed(numbered):
    _, args = numbered
    path, found = Path(args["path"]), []
    for seed, more in ((0, ""), (1, ""), (0, "004")):
        path.write_text(path.read_text() + (f".{more}" if more else ""))
        data = table(**args, seed=seed)
        data.setup()
        found.append((data.source_digest, data.digest))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    assert found[2][0] != found[0][0]


def test_the_builtin_table_is_split_and_standardised_alike_on_every_machine():
    splits = table().splits
    assert sha256(splits["train"].features.numpy()).hexdigest()[:16] == "effc7ac0e44f92e2"
    assert splits["test"].targets[:5, 0].tolist() == [151, 97, 97, 68, 184]


def test_a_constant_feature_is_refused_unless_nothing_is_standardised(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n" + "".join(f"{i},0.1,{i}\n" for i in range(10)))
    with pytest.raises(BadInput, match="column 'b' is constant .0.1 in all 6 training rows"):
        table(path=str(path), target="y").setup()
    table(path=str(path), target="y", standardise=False).setup()
    table(path=str(path), target="y", features=["a"]).setup()


@pytest.mark.parametrize(("rows", "changes"), [(1, {}), (3, {}), (9, {"num_val": 5, "num_test": 3})])
def test_too_few_rows_to_split_are_refused(tmp_path, rows, changes):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i},{i}\n" for i in range(rows)))
    with pytest.raises(BadInput, match=f"{rows} rows leave .* data.num_val=.* data.num_test="):
        table(path=str(path), target="y", **changes).setup()


def test_an_outlier_that_float32_cannot_hold_once_standardised_is_refused(numbered, tmp_path):
    outlier = rows_of(table(**numbered[1]))["test"][0]
    path = tmp_path / "t.csv"
    cells = [1e30 if i == outlier else i * 1e-30 for i in range(40)]
    path.write_text("a,y\n" + "".join(f"{cell!r},1\n" for cell in cells))
    with pytest.raises(BadInput, match="column 'a' reaches too far beyond its training part"):
        table(path=str(path), target="y").setup()


def test_a_table_without_a_target_is_refused(numbered):
    with pytest.raises(BadInput, match="data.target is missing; name one of .*'row'"):
        table(path=numbered[1]["path"]).setup()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delimiter", ""),
        ("delimiter", "::"),
        ("decimal", ";"),
        ("path", ""),
    ],
)
def test_a_bad_value_is_refused_with_its_key(key, value):
    with pytest.raises(BadInput, match=rf"^data\.{key}="):
        table(**{key: value})


@pytest.mark.filterwarnings("ignore:.*different values of column")
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=9),
    seed=st.integers(0, 3),
)
def test_whatever_the_numbers_features_are_finite_and_standard_or_refused(tmp_path_factory, values, seed):
    path = tmp_path_factory.getbasetemp() / "floats.csv"
    path.write_text("x,y\n" + "".join(f"{value!r},1\n" for value in values))
    data = table(path=str(path), target="y", seed=seed, num_val=1, num_test=1)
    try:
        data.setup()
    except BadInput as error:
        assert "constant" in str(error) or "too far" in str(error)
    else:
        x = data.splits["train"].features.double()
        assert x.mean().item() == pytest.approx(0, abs=1e-6)  # float32
        assert x.std(correction=0).item() == pytest.approx(1, rel=1e-6)
        assert all(split.features.isfinite().all() for split in data.splits.values())


def test_values_that_float32_makes_one_are_warned_of_by_name(tmp_path):
    path = tmp_path / "times.csv"  # in milliseconds since 1970
    path.write_text("time,y\n" + "".join(f"{1_700_000_000_000 + 7 * i},{i}\n" for i in range(30)))
    args = {"path": str(path), "target": "y", "standardise": False}
    with pytest.warns(UserWarning, match="the 30 different values of column 'time' are 1 in float32"):
        table(**args).setup()
    double = table(**args)
    double.dtype = torch.float64
    parts = [split.features for split in double.splits.values()]  # without a warning, which is an error
    assert len(torch.cat(parts).unique()) == 30
    assert (
        len(
            torch.cat(
                [split.features for split in table(**args | {"standardise": True}).splits.values()]
            ).unique()
        )
        == 30
    )


def column_of(tmp_path, cells, **changes) -> Table:
    path = tmp_path / "column.csv"
    path.write_text("a,y\n" + "".join(f"{cell},{i}\n" for i, cell in enumerate(cells)))
    return table(**{"path": str(path), "target": "y"} | changes)


def test_values_that_become_one_once_standardised_are_warned_of(tmp_path):
    data = column_of(tmp_path, ["1e12", *range(1, 40)], num_val=0, num_test=0)
    raw = np.array([1e12, *range(1, 40)])
    left = len(np.unique(((raw - raw.mean()) / raw.std()).astype(np.float32)))
    assert left < 5
    with pytest.warns(UserWarning, match=f"40 different values of column 'a' are {left} in float32"):
        data.setup()
    assert len(data.splits["train"].features.unique()) == left
    double = column_of(tmp_path, ["1e12", *range(1, 40)], num_val=0, num_test=0)
    double.dtype = torch.float64
    assert len(double.splits["train"].features.unique()) == 40  # without a warning, which is an error


def test_values_that_half_precision_makes_one_or_infinite_are_told_with_the_precision(tmp_path):
    def half(dtype, cells, **changes):
        data = column_of(tmp_path, cells, **changes)
        data.half = dtype
        return data

    left = len(torch.arange(1000, 1040).bfloat16().unique())
    with pytest.warns(UserWarning, match=f"40 different .* are {left} in bfloat16; set .*=32-true"):
        half(torch.bfloat16, range(1000, 1040), standardise=False).setup()
    half(torch.bfloat16, range(1000, 1040)).setup()  # standardised, they stay apart
    far = "column 'a' reaches too far for float16; set trainer.precision=32-true"
    with pytest.raises(BadInput, match=far):
        half(torch.float16, range(70000, 70040), standardise=False).setup()
    half(torch.float16, range(70000, 70040)).setup()
