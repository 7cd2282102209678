"""Machines that lack something: real namespaces, users and limits, whole processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from process import TrialResult
from tracklight.paths import ROOT

QUICK = ("trainer.max_epochs=2", "num_threads=1", "tracking.figures=false", "trainer.accelerator=cpu")
RUN = (str(ROOT / "train.py"), *QUICK)
SWEEP = (str(ROOT / "train.py"), "-m", "seed=1,2", *QUICK)
SOURCE = str(ROOT / "src")
READS_ALL = "+dac_override,+dac_read_search"  # so that the folders of this test need not be opened
ENDED_S = 600

pytestmark = pytest.mark.slow


def python(*arguments: str, cwd: Path, before: tuple[str, ...] = (), without=(), **env: str):
    """Run Python to its end, by a command before it if there is one."""
    kept = {key: value for key, value in os.environ.items() if key not in without}
    command = [*before, sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=ENDED_S, check=False
    )


def statuses(directory: Path) -> list[str]:
    return [status for _, status in TrialResult(directory).runs]


@pytest.fixture
def volume():
    """A folder with a name short enough for sockets, which that of a test is not."""
    with tempfile.TemporaryDirectory(prefix="volume-") as folder:
        Path(folder).chmod(0o777)  # for a user without root's rights, too
        yield Path(folder)


@pytest.fixture
def read_only(tmp_path, volume):
    """A command under which nothing can be written but in `volume`."""
    script = f"""
        mount --bind {volume} {volume} || exit 99
        for each in / /tmp /var/tmp /dev/shm {tmp_path}; do
            mount -o remount,bind,ro $each 2>/dev/null
        done
        for each in / /tmp /var/tmp /dev/shm {tmp_path}; do
            touch $each/probe 2>/dev/null && exit 99
        done
        exec "$@"
    """
    before = ("unshare", "--mount", "sh", "-c", script, "-")
    if shutil.which("unshare") is None or python("-c", "", cwd=tmp_path, before=before).returncode:
        pytest.skip("needs the right to mount file systems (root)")
    return before


def test_on_a_read_only_root_temporary_files_lie_beside_the_runs(read_only, volume, tmp_path):
    directory = volume / "runs"
    bare = {"before": read_only, "without": ("TMPDIR", "HOME", "MPLCONFIGDIR"), "cwd": tmp_path}
    process = python(*SWEEP, f"tracking.dir={directory}", **bare)
    assert (process.returncode, process.stderr) == (0, "")
    assert statuses(directory) == ["FINISHED"] * 3
    assert (directory / ".tmp").is_dir()
    assert sorted(path.name for path in directory.iterdir() if path.name[0] != ".") == [
        "artifacts",
        "mlflow.db",
    ]


def test_where_nothing_can_be_written_one_line_says_so(read_only, tmp_path):
    bare = {"before": read_only, "without": ("TMPDIR", "HOME"), "cwd": tmp_path}
    for word in ("tracking=none", "tracking=mlflow"):
        process = python(*RUN, word, f"tracking.dir={tmp_path}/runs", **bare)
        assert process.returncode == 2
        assert process.stderr.startswith("error: ")
        assert process.stderr.count("\n") == 1


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path):
    for name in ("logging", "random", "hydra", "torch", "mlflow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')")
    process = python(*SWEEP, f"tracking.dir={tmp_path}/runs", cwd=tmp_path, PYTHONPATH=SOURCE)
    assert (process.returncode, process.stderr) == (0, "")
    assert {*statuses(tmp_path / "runs")} == {"FINISHED"}


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONWARNINGS": "error"},
        {"PYTHONOPTIMIZE": "2", "PYTHONPYCACHEPREFIX": "here"},
        {"TMPDIR": "long"},
        {"HOME": "/proc/nowhere"},
        {"RANK": "1", "NODE_RANK": "1", "SLURM_PROCID": "3"},
    ],
    ids=lambda env: next(iter(env)),
)
def test_odd_surroundings_are_no_matter(tmp_path, env):
    said = ""
    env = {name: str(tmp_path) if value == "here" else value for name, value in env.items()}
    if env.get("TMPDIR") == "long":
        env = {"TMPDIR": str(tmp_path / ("x" * (98 - len(str(tmp_path)) - 1)))}
        Path(env["TMPDIR"]).mkdir()
        said = f"warning: TMPDIR={env['TMPDIR']} is full, cannot be written, or has more than 75 characters;"
    process = python(*SWEEP, f"tracking.dir={tmp_path}/runs", cwd=tmp_path, **env)
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(said)
    assert process.stderr.count("\n") == (said != "")
    assert {*statuses(tmp_path / "runs")} == {"FINISHED"}


def test_a_small_container_is_no_matter(volume, tmp_path):
    """Process 1, a user without a name, hardly any shared memory, 24 open files."""
    script = """
        mount -t tmpfs -o size=64k,mode=1777 none /dev/shm && ulimit -n 24 || exit 99
        exec setpriv --reuid 4242 --clear-groups --inh-caps "$0" --ambient-caps "$0" "$@"
    """
    before = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script, READS_ALL)
    probe = "import os; assert os.getpid() == 1 and os.getuid() == 4242"
    if shutil.which(before[0]) is None or python("-c", probe, cwd=tmp_path, before=before).returncode:
        pytest.skip("needs the right to mount file systems (root)")
    process = python(*SWEEP, f"tracking.dir={volume}/runs", cwd=tmp_path, before=before)
    assert (process.returncode, process.stderr) == (0, "")
    assert statuses(volume / "runs") == ["FINISHED"] * 3


def few_processes(number: int) -> tuple[str, ...]:
    """Return a command under which a user has so many processes and threads: root's are not counted."""
    before = ("bash", "-c", f'ulimit -u {number} && exec "$@"', "-")
    if os.geteuid() == 0:
        user = ("--reuid", "4242", "--clear-groups", "--inh-caps", READS_ALL, "--ambient-caps", READS_ALL)
        before = ("setpriv", *user, *before)
    if shutil.which(before[0]) is None:
        pytest.skip(f"needs {before[0]}")
    return before


@pytest.mark.parametrize(("command", "number"), [(RUN, 1), (RUN, 3), (SWEEP, 3), (SWEEP, 5)])
def test_too_few_processes_are_one_line(volume, command, number):
    process = python(*command, f"tracking.dir={volume}/runs", cwd=volume, before=few_processes(number))
    assert "Traceback" not in process.stderr and "tracking.dir" not in process.stderr
    if process.returncode:
        assert process.stderr.splitlines()[-1].startswith(("error: ", "libgomp: "))


def test_a_server_of_trials_that_dies_as_it_starts_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'forkserver' in ' '.join(sys.orig_argv): os.kill(os.getpid(), 9)\n"
    )
    process = python(*SWEEP, "tracking=none", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{SOURCE}")
    assert process.returncode == 1
    assert process.stderr == (
        "error: no process could be started for a trial; is memory short, or `ulimit -u` too low?\n"
    )


def test_what_trials_cannot_import_is_told_as_their_failure(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'forkserver' in ' '.join(sys.orig_argv): sys.modules['pytorch_lightning'] = None\n"
    )
    directory = tmp_path / "runs"
    words = (f"tracking.dir={directory}",)
    process = python(*SWEEP, *words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{SOURCE}")
    assert process.returncode in (1, 2)
    assert process.stderr.startswith("error: ")
    assert "pytorch_lightning" in process.stderr
    assert process.stderr.count("\n") == 1
