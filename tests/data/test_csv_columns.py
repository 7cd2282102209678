import csv
import io
import os
import tracemalloc
from decimal import Decimal, InvalidOperation

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracklight.data import csv_columns
from tracklight.data.csv_columns import read_columns, read_features
from tracklight.errors import BadInput

TABLE = "a,b,y\n1,2,3\n-4,5.5,6e3\n"
VALUES = [[1, 2, 3], [-4, 5.5, 6000]]


def read(path, content, target="y", features=None, delimiter=",", decimal="."):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_columns(path, target and [target], features, delimiter, decimal)


@pytest.mark.parametrize("content", ["\0", "1,2,3,", "\n", "#\n"])
def test_a_file_that_never_comes_to_a_table_is_not_held_in_memory(tmp_path, content, monkeypatch):
    monkeypatch.setattr(csv_columns, "MAX_LINE_CHARS", 1000)
    monkeypatch.setattr(csv_columns, "MAX_COMMENTS", 1000)
    path = tmp_path / "endless.csv"
    path.write_text(content * 1_000_000)
    tracemalloc.start()
    with pytest.raises(BadInput):
        read_features(path, ["a"], ",")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [
        (TABLE, ","),
        (TABLE.encode("utf-8-sig"), ","),
        (TABLE.encode("utf-16"), ","),
        (b"\xfe\xff" + TABLE.encode("utf-16-be"), ","),
        (TABLE.encode("utf-32"), ","),
        (TABLE.replace("\n", "\r\n"), ","),
        (TABLE.replace("\n", "\r"), ","),
        (TABLE.replace("\n", "\n\n"), ","),
        (TABLE.removesuffix("\n"), ","),
        (TABLE.replace(",", " , "), ","),
        (TABLE.replace(",", ";"), ";"),
        (TABLE.replace(",", "\t"), "\t"),
        ('"a","b",y\n"1",2,"3"\n-4,5.5,6e3\n', ","),
        ('"a";"b";"y"\n1;2;3\n-4;5.5;6e3\n', ";"),
        ("sep=;\n" + TABLE.replace(",", ";"), ","),
        ('"sep=\t"\r\n' + TABLE.replace(",", "\t").replace("\n", "\r\n"), ","),
        (TABLE.replace(",", " "), " "),
        ("# made by me\n" + TABLE, ","),
        ("# made by me, you, them\n#\n\n" + TABLE, ","),
        ('# one "quote, a\r\n#two\r\n' + TABLE.replace("\n", "\r\n"), ","),
        (("# made by; me\n" + TABLE.replace(",", ";")).encode("utf-16"), ";"),
        ("sep=;\n# made by me\n" + TABLE.replace(",", ";"), ","),
        ("# made by me\n" + TABLE.replace(",", " "), " "),
        ("  a   b\ty \n  1   2   3\n -4 5.5\t 6e3\n", " "),
    ],
)
def test_one_table_reads_the_same_in_every_dress(tmp_path, content, delimiter):
    features, targets, values = read(tmp_path / "t.csv", content, delimiter=delimiter)
    assert (features, targets) == (["a", "b"], ["y"])
    assert values.tolist() == VALUES


def test_a_header_that_begins_with_the_sign_of_a_comment_is_one_and_lines_are_counted_from_the_top(tmp_path):
    for top in ("", "# made by me\n", "#1\n\n#\n"):
        for space in ("", "\n"):
            content = f"{top}#id,name,y\n{space}1,bob,2\n3,#eve,4\n"
            features, targets, values = read(tmp_path / "t.csv", content, features=["#id"])
            assert (features, targets, values.tolist()) == (["#id"], ["y"], [[1, 2], [3, 4]])
    with pytest.raises(BadInput, match="line 5, column 'y': got 'z'"):
        read(tmp_path / "t.csv", "# made by me\n#\na,y\n1,2\n3,z\n")
    with pytest.raises(BadInput, match="empty"):
        read(tmp_path / "t.csv", "# a,y\n")


def test_chosen_columns_come_in_the_order_asked_for_and_others_may_hold_anything(tmp_path):
    content = "name,y,b,a\nx,3,2,1\n,6,5,nan\n"
    features, _, values = read(tmp_path / "t.csv", content, features=["b"])
    assert features == ["b"]
    assert values.tolist() == [[2, 3], [5, 6]]
    features, targets, values = read(tmp_path / "t.csv", "a,b,y\n1,2,3\n", "a", ["y", "b"])
    assert (features, targets, values.tolist()) == (["y", "b"], ["a"], [[3, 2, 1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty; expected a header"),
        ("\n\n", "empty; expected a header"),
        ("a,b,y\n", "a header only"),
        ("a,b,y\n1,2,3\n4,nan,6\n", "line 3, column 'b': got 'nan', expected a finite number"),
        ("a,b,y\n1,2,inf\n", "line 2, column 'y': got 'inf'"),
        ("a,b,y\n1,2,1e39\n", "line 2, column 'y': got '1e39'"),
        ("a,b,y\n1,two,3\n", "line 2, column 'b': got 'two'"),
        ("a,b,y\n1,2_0,3\n", "line 2, column 'b': got '2_0'"),
        ("a,b,y\n\n1, ,3\n", "line 3, column 'b': got an empty cell"),
        ("a,b,y\n1,2,3\n4,5\n", "line 3 has 2 cells, expected 3"),
        ("a,b,y\n1,2,3,4\n", "line 2 has 4 cells, expected 3"),
        (
            "a,b,price\n1,2,3\n",
            "data.target names 'y', which is no column; have ['a', 'b', 'price']",
        ),
        ("a,b,yy\n1,2,3\n", "data.target names 'y', which is no column; did you mean 'yy'?"),
        ("a,a,y\n1,2,3\n", "2 columns are named 'a'"),
        ("a,,y\n1,2,3\n", "column 2 has no name"),
        ("y\n1\n", "no feature column"),
        ("a;b;y\n1;2;3\n", "try 'data.delimiter=\";\"'"),
        ('a,b,y\n1,"2,3\n', "not a CSV file"),
        ("a,b,y\n1,2,é\n".encode("latin-1"), "not UTF-8 text"),
        (TABLE.encode("utf-16")[:-1], "not UTF-8 text"),
        (TABLE.encode("utf-16-le"), "which is no column"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "t.csv"
    with pytest.raises(BadInput) as error:
        read(path, content)
    assert str(error.value).startswith(f"data.path={path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "features", "message"),
    [
        (None, None, "data.target is missing; name one of ['a', 'b', 'y']"),
        ("y", ["a", "c"], "data.features names 'c', which is no column; have"),
        ("y", [], "no feature column"),
        ("y", ["a", "a"], "data.features names 'a' twice"),
        ("y", ["a", "y"], "data.features holds the target 'y'"),
        ("y", [1], "data.features names 1, which is no column"),
    ],
)
def test_a_bad_choice_of_columns_is_refused(tmp_path, target, features, message):
    with pytest.raises(BadInput) as error:
        read(tmp_path / "t.csv", TABLE, target, features)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "cures"),
    [
        ('"a";"b";"y"\n1,5;2;3\n', {"delimiter": ";", "decimal": ","}),
        ("a;b;y\n1;2;3\n", {"delimiter": ";"}),
        ("a b  y\n1.5 2  3\n", {"delimiter": " "}),
        ("  a   b\ty\n 1.5 2\t3\n", {"delimiter": " "}),
        ("a\tb\ty\n1,5\t2\t3\n", {"delimiter": "\t", "decimal": ","}),
        ('a,b,y\n"1,5",2,3\n', {"decimal": ","}),
    ],
)
def test_the_delimiter_and_the_decimal_that_are_offered_read_the_file(tmp_path, content, cures):
    with pytest.raises(BadInput) as refusal:
        read(tmp_path / "t.csv", content)
    for key, value in cures.items():
        typed = value.replace("\t", "\\t")
        assert f"'data.{key}=\"{typed}\"'" in str(refusal.value)
    first = 1.5 if "1.5" in content or "1,5" in content else 1.0
    assert read(tmp_path / "t.csv", content, **cures)[2].tolist() == [[first, 2, 3]]


def test_under_a_decimal_comma_a_point_is_refused_for_it_may_part_thousands(tmp_path):
    with pytest.raises(BadInput, match="got '1.500'.*try 'data.decimal=\".\"'"):
        read(tmp_path / "t.csv", "a;y\n1.500;2\n", delimiter=";", decimal=",")


def test_one_column_whose_name_has_a_blank_is_read_as_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("my feature\n1\n2\n")
    assert read_features(path, ["my feature"], ",").tolist() == [[1], [2]]


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", tmp_path / ("long" * 100)):
        with pytest.raises(BadInput, match=f"^data.path={path}: "):
            read_columns(path, ["y"], None, ",")


NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-1000, 1000, places=3).map(str),
)
CELLS = st.one_of(NUMBERS, NUMBERS, NUMBERS, st.text(st.characters(codec="utf-8"), max_size=4))


def as_number(cell: str) -> float | None:
    """The cell's value by way of `Decimal`, None where it is no number that float32 holds."""
    try:
        value = Decimal(cell.strip())
    except InvalidOperation:
        return None
    if "_" in cell or not value.is_finite() or abs(value) > (2 - Decimal(2) ** -23) * 2**127:
        return None
    return float(value)


@given(
    rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    delimiter=st.sampled_from(",;\t"),
)
def test_a_grid_of_cells_is_read_right_or_refused(tmp_path_factory, rows, encoding, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["x", "y"], *rows])
    path = tmp_path_factory.getbasetemp() / "grid.csv"
    content = text.getvalue().encode(encoding)
    expected = [[as_number(cell) for cell in row] for row in rows]
    if any(number is None for row in expected for number in row):
        with pytest.raises(BadInput) as error:
            read(path, content, delimiter=delimiter)
        assert len(str(error.value).splitlines()) == 1
    else:
        assert read(path, content, delimiter=delimiter)[2].tolist() == expected


@given(content=st.one_of(st.binary(max_size=60), st.text('xy,;\n\r" 01.5e-\0', max_size=60)))
def test_arbitrary_contents_give_finite_numbers_or_a_refusal(tmp_path_factory, content):
    content = content if isinstance(content, bytes) else b"x,y\n" + content.encode()
    try:
        features, _, values = read(tmp_path_factory.getbasetemp() / "any.csv", content)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert values.shape[1] == len(features) + 1
        assert np.isfinite(values).all()


def test_identifiers_that_float64_makes_one_are_refused_by_name(tmp_path):
    rows = "".join(f"{2**53 + i},{i}\n" for i in range(30))
    left = len({float(2**53 + i) for i in range(30)})
    problem = f"the 30 different values of column 'a' are {left} in float64; identifiers"
    with pytest.raises(BadInput, match=f"{problem} .*: leave the column out of data.features"):
        read(tmp_path / "ids.csv", "a,y\n" + rows)
    with pytest.raises(BadInput, match=f"{problem} .*: name another data.target"):
        read_columns(tmp_path / "ids.csv", ["a"], ["y"], ",")
    apart = "".join(f"{2**53 + 2 * i},{i}\n" for i in range(30))
    assert len(np.unique(read(tmp_path / "ids.csv", "a,y\n" + apart)[2][:, 0])) == 30
    again = "a,y\n9007199254740992,1\n9.007199254740992e15,2\n"
    assert read(tmp_path / "ids.csv", again)[2].shape == (2, 2)


def test_cells_that_float64_makes_one_are_warned_of_unless_they_are_one_number(tmp_path):
    cells = [f"17{i:08}.{k:09}" for i in range(20) for k in (1, 2)]  # nanoseconds apart
    rows = "".join(f"{cell},{i}\n" for i, cell in enumerate(cells))
    with pytest.warns(UserWarning, match="the 40 different values of column 'a' are 20 in float64"):
        read(tmp_path / "times.csv", "a,y\n" + rows)
    same = ("1", "1.0", "1e0", "0.1", "0.10000000000000000000", "1.000000000000000000e-01", "-0", "0.0")
    for extra in (same, [f"{value:.18e}" for value in np.random.default_rng(0).normal(size=40)]):
        read(tmp_path / "same.csv", "a,y\n" + "".join(f"{cell},1\n" for cell in extra))  # without a word
    tiny = "a,y\n1e-99999999999999999999999,1\n0e99999999999999999999999,2\n"
    assert read(tmp_path / "tiny.csv", tiny)[2][:, 0].tolist() == [0, 0]
