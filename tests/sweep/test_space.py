"""Overrides as axes."""

import pytest

from tracklight.errors import BadInput
from tracklight.sweep.space import read_space


def space(*words, preset=None):
    return read_space(list(words), preset or {}, None)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ("a,b,c", ("a", "b", "c")),
        ("choice(1,2)", ("1", "2")),
        ("range(1,4)", ("1", "2", "3")),
        ("range(4,0,-2)", ("4", "2")),
        ("range(0,1,0.25)", ("0.0", "0.25", "0.5", "0.75")),
        ("[64],[128,64]", ("[64]", "[128,64]")),
        ("1,1,2", ("1", "2")),
        ("null,true", ("null", "true")),
        ("sort(3,1,2)", ("1", "2", "3")),
        ("'a, b',c", ("'a, b'", "c")),
    ],
)
def test_lists_are_grids_by_hydras_grammar(values, texts):
    (axis,) = space(f"key={values}").axes
    got = tuple(text.lower() if text in ("True",) else text for text in axis.texts)
    assert got == texts
    assert not axis.is_interval


def test_a_grid_is_the_product_with_the_last_axis_fastest():
    found = list(space("a=1,2", "fixed=7", "b.c=x,y").grid())
    assert found == [
        {"a": "1", "b.c": "x"},
        {"a": "1", "b.c": "y"},
        {"a": "2", "b.c": "x"},
        {"a": "2", "b.c": "y"},
    ]
    assert space("a=1,2", "fixed=7").fixed == ("fixed=7",)


def test_a_preset_gives_way_to_the_command_line():
    found = space("a=3", "b=5,6", preset={"a": "1,2", "b": "1,2", "c": "interval(0,1)"})
    assert found.fixed == ("a=3",)
    assert found.expressions() == {"b": "5,6", "c": "interval(0,1)"}


@pytest.mark.parametrize(
    ("values", "kind", "attributes"),
    [
        ("interval(1,2)", "FloatDistribution", {"low": 1.0, "high": 2.0, "log": False}),
        ("tag(log,interval(1e-4,1))", "FloatDistribution", {"low": 1e-4, "log": True}),
        ("int(interval(1,9))", "IntDistribution", {"low": 1, "high": 9, "step": 1}),
        ("range(2,11,3)", "IntDistribution", {"low": 2, "high": 8, "step": 3}),
        ("range(0,1,0.25)", "FloatDistribution", {"low": 0.0, "high": 0.75, "step": 0.25}),
        ("1,2.5,x,null,true", "CategoricalDistribution", {"choices": (1, 2.5, "x", None, True)}),
        ("[1],[2]", "CategoricalDistribution", {"choices": ("[1]", "[2]")}),
    ],
)
def test_a_search_draws_from_what_the_values_say(values, kind, attributes):
    (axis,) = space(f"key={values}").axes
    distribution = axis.distribution()
    assert type(distribution).__name__ == kind
    assert {name: getattr(distribution, name) for name in attributes} == attributes


def test_what_is_drawn_reads_back_as_the_same_value():
    (axis,) = space("key=1,true,1.0,'a b',null,[1,2]").axes
    drawn = axis.distribution().choices
    assert [axis.to_text(value) for value in drawn] == list(axis.texts)
    (axis,) = space("key=interval(0,1)").axes
    assert float(axis.to_text(0.1 + 0.2)) == 0.1 + 0.2
    (axis,) = space("key=range(0.1,0.6,0.1)").axes
    added = [0.1 + step * 0.1 for step in range(5)]
    assert added[2] != 0.3 and [axis.to_text(value) for value in added] == [*axis.texts]


def test_shuffled_values_are_drawn_as_what_they_are_and_the_same_after_a_restart():
    words = "key=shuffle(" + ",".join(map(str, range(50))) + ")"
    one, other = (space(words).axes[0] for _ in range(2))
    assert one.texts != other.texts
    assert one.distribution() == other.distribution()
    assert all(axis.to_text(value) == str(value) for axis in (one, other) for value in range(50))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("interval(1,0)", "key=interval(1,0) is empty"),
        ("interval(1,1)", "is empty"),
        ("int(interval(4,2))", "whole number must be below the second; try key=int(interval(2,4))"),
        ("interval(0,inf)", "must be finite"),
        ("tag(log,interval(0,1))", "start above 0"),
        ("tag(log,range(1,9))", "only an interval is searched logarithmically"),
        ("range(5,5)", "has no values"),
    ],
)
def test_an_axis_without_values_is_refused(values, told):
    (axis,) = space(f"key={values}").axes
    with pytest.raises(BadInput) as refused:
        axis.check(is_search=True)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_corners_hold_both_ends_of_numbers_and_all_of_a_list():
    found = list(space("a=interval(0,1)", "b=x,y,z", "c=range(1,9)").corners())
    assert {each["a"] for each in found} == {"0.0", "1.0"}
    assert {each["b"] for each in found} == {"x", "y", "z"}
    assert {each["c"] for each in found} == {"1", "8"}
    assert len(found) == 5
