"""The machines that run one sweep, each by the same command; the first of them leads.

They meet in Optuna's storage: each is a running trial of a study that holds nothing else, and Optuna's
heartbeats tell which of them are alive. The leader has the sweep's parent run.
"""

import fcntl
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracklight.errors import BadInput
from tracklight.sweep.storage import GRACE_S, HEARTBEAT_S, MACHINES, PatientStorage, enqueue_again, trial_id
from tracklight.sweep.study import MACHINE_ATTR, OptunaStudy

PARENT_ATTR = "parent"  # of the leader: the id of the parent run
FAILURE_ATTR = "failure"  # of a machine that has ended the sweep for it: the trial's number and the reason


class Machines:
    """This machine among those of a sweep, from its construction to `leave`; the storage is a database.

    Raises:
        BadInput: Another process runs the sweep in the same `directory`.
    """

    def __init__(self, storage: Any, name: str, directory: Path):
        self.id = self._hold(directory / f".sweep-{name}.lock")
        self.leads = self.is_lost = False  # is_lost: the others have given this machine up
        self.has_ended = self.is_over = False  # as the leader; or for one that led, before this machine
        self.num_ranked = 0  # finished trials that the leader has ended the sweep with
        self.failure: tuple[int, str] | None = None  # that has ended the sweep, on any machine
        self.trials: OptunaStudy | None = None  # of the sweep, once it is open
        self._database, self._storage, self._told = storage, PatientStorage(storage), PatientStorage(storage)
        self._name = f"{name}{MACHINES}"
        optuna.create_study(storage=storage, study_name=self._name, load_if_exists=True)
        for trial in self._running(self._name):  # of an earlier command here, which has ended
            if trial.user_attrs.get(MACHINE_ATTR) == self.id:
                self._storage.set_trial_state_values(
                    trial_id(self._storage, self._name, trial.number), TrialState.FAIL
                )
        own = create_trial(state=TrialState.RUNNING, user_attrs={MACHINE_ATTR: self.id})
        self._own_id = self._storage.create_new_trial(self._storage.get_study_id_from_name(self._name), own)
        self._number = self._leader = self._storage.get_trial(self._own_id).number
        self._orphans: dict[int, float] = {}  # since when a trial is known to have no machine
        self._earlier = {each.number for each in self._failed() if each.state != TrialState.RUNNING}
        self._seen_s, self._left = time.monotonic(), threading.Event()
        self._refresh()
        threading.Thread(target=self._beat, daemon=True).start()

    def _hold(self, path: Path) -> str:
        """Lock the file for the life of this process; return its content, which is this machine's id."""
        self._lock = path.open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            hint = "wait for it, or let this process join it by a tracking.dir of its own"
            raise BadInput(f"this very sweep runs in {path.parent}; {hint}") from None
        self._lock.seek(0)
        if not (found := self._lock.read().strip()):
            found = uuid.uuid4().hex
            self._lock.write(found)
            self._lock.flush()
            os.fsync(self._lock.fileno())
        return found

    def _running(self, study_name: str) -> list[FrozenTrial]:
        """Return the running trials of a study, by their number."""
        study_id, running = self._storage.get_study_id_from_name(study_name), (TrialState.RUNNING,)
        return self._storage.get_all_trials(study_id, deepcopy=False, states=running)

    def wait_for_leader(self) -> str | None:
        """Return the id of the parent run that the leader has opened; None if this machine leads."""
        while True:
            self._refresh()
            if self.leads:
                return None
            for leader in self._running(self._name)[:1]:
                if run_id := leader.user_attrs.get(PARENT_ATTR):
                    return run_id
            time.sleep(HEARTBEAT_S / 10)

    def announce(self, run_id: str) -> None:
        """Tell the others the parent run, in case that they ask this machine as their leader."""
        self._storage.set_trial_user_attr(self._own_id, PARENT_ATTR, run_id)

    def halt(self, number: int, reason: str) -> None:
        """Tell the others to end the sweep, too: a trial has failed."""
        self.failure = number, reason
        self._told.set_trial_user_attr(self._own_id, FAILURE_ATTR, self.failure)

    def read_failure(self) -> None:
        """Learn whether a failed trial has ended the sweep on another machine."""
        new = [each.user_attrs[FAILURE_ATTR] for each in self._failed() if each.number not in self._earlier]
        self.failure = self.failure or (tuple(new[0]) if new else None)

    @property
    def is_waiting(self) -> bool:
        """Whether `halt` waits for a storage that is away."""
        return self._told.is_waiting

    def _failed(self) -> list[FrozenTrial]:
        """Return the machines that have ended the sweep for a failed trial."""
        study_id = self._storage.get_study_id_from_name(self._name)
        every = self._storage.get_all_trials(study_id, deepcopy=False)
        return [each for each in every if FAILURE_ATTR in each.user_attrs]

    def leave(self) -> None:
        """Leave the sweep: unless it has ended, another machine leads from now on."""
        self._left.set()
        outcome = (TrialState.COMPLETE, [float(self.num_ranked)]) if self.has_ended else (TrialState.FAIL,)
        with suppress(Exception):  # the storage is away, or the others have noticed by themselves
            self._database.set_trial_state_values(self._own_id, *outcome)
        self._lock.close()

    def _beat(self) -> None:
        while not self._left.wait(HEARTBEAT_S):
            try:
                self._refresh()
            except Exception:  # the storage is away; what needs it says so
                continue

    def _refresh(self) -> None:
        """Tell the others that this machine is alive, and give up those that are not."""
        for each in (self._own_id, *(self.trials.running_ids if self.trials else ())):
            self._storage.record_heartbeat(each)
        # After an outage of the storage the others, too, need a moment to tell that they are alive.
        seen_s, self._seen_s = self._seen_s, time.monotonic()
        if self._seen_s - seen_s < 3 * HEARTBEAT_S:
            fail_stale_trials(self._study(self._name))
            if self.trials and self.leads:
                fail_stale_trials(self._study(self.trials.name))
                self._fail_orphans(self.trials.name)
        self.read_failure()
        numbers = [trial.number for trial in self._running(self._name)]
        self.is_lost = self._number not in numbers
        if self._leader not in (self._number, *numbers):
            leader = self._storage.get_trial(trial_id(self._storage, self._name, self._leader))
            if leader.state == TrialState.COMPLETE:
                self.num_ranked, self.is_over = int(leader.value or 0), True
        self._leader = numbers[0] if numbers else self._number
        self.leads = self._leader == self._number and not (self.is_lost or self.is_over)

    def _study(self, name: str) -> optuna.Study:
        return optuna.load_study(storage=self._database, study_name=name)

    def _fail_orphans(self, name: str) -> None:
        """Give up the trials whose machine was killed between their creation and their first heartbeat."""
        numbers = [each.number for each in self._running(name) if MACHINE_ATTR not in each.user_attrs]
        now_s = time.monotonic()
        self._orphans = {number: self._orphans.get(number, now_s) for number in numbers}
        for number in (number for number, since_s in self._orphans.items() if now_s - since_s > GRACE_S):
            failed = trial_id(self._storage, name, number)
            self._storage.set_trial_state_values(failed, TrialState.FAIL)
            enqueue_again(self._study(name), self._storage.get_trial(failed))
