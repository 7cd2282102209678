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
    whole_s, kills, num_finished = time.monotonic() - began, 0, 0
    while kills < KILLS or not num_finished:
        directory = tmp_path / f"killed {num_finished}"
        process = commander.start(directory, command)
        if kills < KILLS:
            time.sleep(draws.uniform(0.2, 0.9) * whole_s)
            process.send(signal.SIGKILL)
        if process.wait(600) == -signal.SIGKILL:
            kills += 1
            continue
        num_finished += 1
        assert process.exit_code == 0
        assert {run.status for run in Swept(directory).runs} == {"FINISHED"}
        assert_equal(directory, tmp_path / "whole", rel=1e-6, abs=1e-9)
    print(f"\npopulation: {kills} kills, {num_finished} sweeps finished")
