"""Kill -9 at many random instants, and compare: `make torture`; `make torture ARGS="-k short"`.

Named so that pytest runs it only when told to: it takes minutes.
"""

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from configs import CONFIGS, EACH_EPOCH, EPOCHS, FURTHER_CONFIGS
from test_kills import POINTS, kill_at

from process import Process, Trainees, TrialResult

FAULTS = [["spare_model"], EACH_EPOCH]
ALL = CONFIGS | FURTHER_CONFIGS
MUTATIONS = ("forget_epoch_order", "forget_step_seeding", "forget_replay_filter")


@dataclass
class Campaign:
    """What came of many kills of one kind of run."""

    kills: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = {
            kind: sum(each.startswith(kind) for each in self.differences)
            for kind in ("last.ckpt", "best.ckpt", "lost", "doubled", "not in", "runs", "left")
        }
        shown = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        return f"{self.kills} kills, {self.runs} runs finished; differences: {shown}"


def wage(
    trainees: Trainees,
    folder: Path,
    config: Sequence[str],
    kills: int,
    seed: int,
    mutation: Sequence[Sequence[Any]] = (),
) -> Campaign:
    """Kill a run again and again until it has ended, then the next, until enough kills struck."""
    draws = random.Random(seed)
    faults = [*FAULTS, *mutation]
    whole = folder / "whole"
    began = time.monotonic()
    process = trainees.train(whole, *config, EPOCHS, faults=faults)
    assert process.exit_code == 0, process.stderr
    whole_s = time.monotonic() - began
    campaign = Campaign()
    while campaign.kills < kills:
        directory = folder / f"run-{campaign.runs}"
        command = (*config, EPOCHS, "resume=auto")
        spared_for = draws.randrange(2, 9)  # lives that are cut short; then the run may end
        for _ in range(spared_for):
            process = trainees.start(directory, command, faults)
            if not ended_before(process, draws.uniform(0.05, 1.0) * whole_s):
                process.send(signal.SIGKILL)
                process.wait()
            campaign.kills += process.exit_code == -signal.SIGKILL
            if has_ended(directory):
                break
        else:
            process = trainees.train(directory, *command, faults=faults)
            assert process.exit_code == 0, process.stderr
        campaign.runs += 1
        campaign.differences += TrialResult(directory).differences(TrialResult(whole))
    return campaign


def ended_before(process: Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.exit_code is None:
        time.sleep(0.002)
    assert process.exit_code in (None, 0), process.stderr
    return process.exit_code is not None


def has_ended(directory: Path) -> bool:
    """Say whether the run is over: a kill after its end, before the process's, changes nothing."""
    try:
        outcome = TrialResult(directory)
        lock = directory / "artifacts" / outcome.run_id / "run.lock"
        return outcome.status == "FINISHED" and not lock.exists()
    except IndexError:
        return False


def told(name: str, campaign: Campaign) -> Campaign:
    print(f"\n{name}: {campaign}")
    return campaign


@pytest.mark.parametrize("name", CONFIGS)
def test_kills_at_every_named_point_change_nothing(trainees, undisturbed, tmp_path, name):
    points = [*POINTS]
    for start in range(0, len(points), 6):  # one run is too short for all, if it stops early
        directory = tmp_path / f"runs {start}"
        kill_at(trainees, directory, name, points[start : start + 6])
        assert TrialResult(directory).differences(undisturbed(name)) == []


@pytest.mark.parametrize("name", ALL)
def test_random_kills_change_nothing(trainees, tmp_path, name):
    kills = 14 if name in CONFIGS else 8
    campaign = told(name, wage(trainees, tmp_path, ALL[name], kills, seed=len(name)))
    assert campaign.differences == []


@pytest.mark.parametrize("name", ["blocks", "foreign"])
def test_in_short_random_kills_change_nothing(trainees, tmp_path, name):
    campaign = told(name, wage(trainees, tmp_path, CONFIGS[name], kills=6, seed=1))
    assert campaign.differences == []


# Not for the foreign data set: each of its epochs reseeds the generators before its first batch.
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["blocks", "plain"])
def test_without_this_mechanism_random_kills_show(trainees, tmp_path, name, mutation):
    campaign = wage(trainees, tmp_path, CONFIGS[name], kills=10, seed=2, mutation=[[mutation]])
    assert told(f"{name}, {mutation}", campaign).differences != []
