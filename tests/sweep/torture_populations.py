"""Kill -9 a population at many random instants, and compare; a part of `make torture`.

Named so that pytest runs it only when told to: it takes minutes.
"""

import random
import signal
import time

import pytest
from test_populations import LONG, TOGETHER, assert_equal

from commands import Swept

KILLS = 8


@pytest.mark.parametrize("seed", [0, 1])
def test_random_kills_of_a_population_change_nothing(commander, tmp_path, seed):
    draws, command = random.Random(seed), ("-m", *LONG, TOGETHER, "trainer.max_epochs=150")
    began = time.monotonic()
    assert commander.start(tmp_path / "whole", command).wait(600) == 0
    whole_s, kills = time.monotonic() - began, 0
    for _ in range(KILLS):
        process = commander.start(tmp_path / "killed", command)
        time.sleep(draws.uniform(0.2, 0.9) * whole_s)
        process.send(signal.SIGKILL)
        process.wait()
        kills += process.exit_code == -signal.SIGKILL
    assert commander.start(tmp_path / "killed", command).wait(600) == 0
    print(f"\npopulation: {kills} kills")
    assert kills > KILLS // 2
    assert {run.status for run in Swept(tmp_path / "killed").runs} == {"FINISHED"}
    assert_equal(tmp_path / "killed", tmp_path / "whole", rel=1e-3, abs=1e-5)
