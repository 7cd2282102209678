import pytest

from tracklight.sweep.points import shown
from tracklight.sweep.progress import duration


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3720, "1 h 2 min")]
)
def test_durations_are_told_in_their_two_largest_units(seconds, said):
    assert duration(seconds) == said


def test_what_varies_is_told_shortly_and_never_ambiguously():
    assert shown({"optimizer.lr": "0.001234567891", "model.hidden": "[64]"}) == (
        "lr=0.0012346 hidden=[64]"
    )
    assert shown({"a.x": "1", "b.x": "2"}) == "a.x=1 b.x=2"
