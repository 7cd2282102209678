"""The types of config values: from annotations, and from the files in conf/."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import yaml
from torch import Tensor

from tracklight.config.compose import compose, to_plain
from tracklight.config.rules import check_values
from tracklight.config.types import describe, fits, misfit
from tracklight.errors import BadInput
from tracklight.paths import CONF


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (bool, [True, False], ["no", "off", 0, 1, None, []]),
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0.5, 1], [True, "1", None, [1.0]]),
        (str, ["", "x"], [1, None, True, ["x"]]),
        (None, [None], [0, "", False]),
        (Optional[int], [None, 1], [True, "x"]),  # noqa: UP045
        (float | Tensor, [0.1, 1], ["x", True]),
        (Union[int, list[int]], [1, [1, 2], []], ["x", [1.5], {}]),  # noqa: UP007
        (tuple[float, float], [[0.9, 0.999]], [[0.9], [0.9, "x"], [1, 2, 3], 0.9]),
        (tuple[int, ...], [[], [1, 2, 3]], [["x"], 1]),
        (Sequence[str], [["a"], []], [[1], 1]),
        (dict[str, int], [{}, {"a": 1}], [[], "a"]),
        (Literal["min", "max"], ["min"], ["maximum", 1, None]),
        (Path, ["/tmp"], [1, None]),
        (Callable, [], ["x", 1]),
        (Any, [1, "x", None, []], []),
        (object, [1, "x", None, []], []),
        ("SomeName", [1, "x"], []),
    ],
)
def test_a_plain_value_fits_what_an_annotation_says(kind, good, bad):
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)


def test_what_was_built_already_fits_everywhere():
    assert fits(Tensor(), int) and fits(object(), str | None)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "true or false"),
        (Optional[int], "a whole number or null"),  # noqa: UP045
        (tuple[float, float], "a list of 2, each a number"),
        (float | Tensor, "a number"),
        (Literal["min", "max"], "min or max"),
    ],
)
def test_a_type_is_described_in_words(kind, words):
    assert describe(kind) == words


def test_a_default_is_allowed_whatever_the_annotation_says():
    def build(width: int = None, *sizes: int, name: str = "x", **rest: int):  # noqa: RUF013
        pass

    assert misfit(build, {"width": None, "name": "y", "rest": "z", "other": "w"}) is None
    assert misfit(build, {"width": "wide"}).name == "width"


def switches():
    for path in sorted(CONF.glob("*/*.yaml")):
        text, group = path.read_text(), path.parent.name
        if group in ("experiment", "sweep"):
            continue
        tree = yaml.safe_load(text) or {}
        nodes = tree if text.startswith("# @package _global_") else {group: tree}
        for above, node in nodes.items():
            for key, value in node.items() if isinstance(node, dict) else ():
                if isinstance(value, bool) and not (path.stem == "none" and key == "enabled"):
                    yield f"{group}={path.stem}", f"{above}.{key}"


@pytest.mark.parametrize("choice", sorted({choice for choice, _ in switches()}))
def test_every_switch_in_conf_takes_true_and_false_alone(choice):
    tree = to_plain(compose([choice]))
    for key in [key for other, key in switches() if other == choice]:
        group, _, name = key.partition(".")
        for value in ("no", "off", "x", 7.5, [True], None):
            with pytest.raises(BadInput, match=f"{key}=.* must be true"):
                check_values(tree | {group: tree[group] | {name: value}})
