import time

import pytest

from tracklight.sweep.study import bounded


def test_what_takes_too_long_is_left_behind():
    with pytest.raises(TimeoutError):
        bounded(lambda: time.sleep(5), 0.05)


def test_results_and_errors_come_through():
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5)
