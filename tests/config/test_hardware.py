"""What the machine is asked for is what this process may use of it, not what it has."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from tracklight.config import hardware
from tracklight.config.hardware import choose_temporary_folder, count_cores, default_threads, describe_machine
from tracklight.errors import BadInput

COUNT = "from tracklight.config.hardware import count_cores; print(count_cores())"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"": {"cpu__max": "150000 100000"}}, [1.5]),
        ("0::/a/b", {"a/b": {"cpu__max": "max 100000"}, "a": {"cpu__max": "50000 100000"}}, [0.5]),
        ("0::/docker/outside", {"": {"cpu__max": "300000 100000"}}, [3.0]),
        ("0::/", {}, []),
        (
            "4:cpu,cpuacct:/job\n3:cpuset:/job\n0::/",
            {"cpu,cpuacct/job": {"cpu__cfs_quota_us": "200000", "cpu__cfs_period_us": "100000"}},
            [2.0],
        ),
        ("1:cpu:/", {"cpu": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, []),
    ],
)
def test_a_quota_is_read_from_every_control_group_around_this_process(tmp_path, groups, files, cores):
    write(tmp_path, cgroup=groups)
    for folder, contents in files.items():
        write(tmp_path / "mount" / folder, **contents)
    assert list(hardware._quotas(tmp_path / "cgroup", tmp_path / "mount")) == cores


@pytest.fixture
def group():
    """A control group of its own, with a quota of one core and a half."""
    own = Path("/proc/self/cgroup").read_text() if Path("/proc/self/cgroup").exists() else ""
    one = re.search(r"^\d+:([^:\n]*\bcpu\b[^:\n]*):(.*)$", own, re.M)  # v1
    folder = Path(
        "/sys/fs/cgroup", *([one[1], one[2].strip("/")] if one else []), f"tracklight-{os.getpid()}"
    )
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs the right to make a control group (root)")
    try:
        with suppress(OSError):  # v1 and v2: one of the two files is there
            (folder / "cpu.max").write_text("150000 100000")
        if one:
            (folder / "cpu.cfs_quota_us").write_text("150000")
        elif not (folder / "cpu.max").exists():
            pytest.skip("needs the controller of CPUs in the control groups below this one")
        yield folder
    finally:
        folder.rmdir()


def test_in_a_container_with_a_quota_of_one_core_and_a_half_there_is_one(group):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "-", sys.executable, "-c", COUNT]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"


def test_of_affinity_quota_and_slurm_the_least_counts(monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    monkeypatch.setattr(hardware, "_quotas", lambda: [])
    assert count_cores() == 8
    monkeypatch.setattr(hardware, "_quotas", lambda: [5.5, 6.0])
    assert count_cores() == 5
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert count_cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert count_cores() == 2
    assert describe_machine()["usable_cores"] == 2
    monkeypatch.setattr(hardware, "_quotas", lambda: [0.5])
    assert count_cores() == 1


def test_threads_are_what_omp_says_else_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(hardware, "count_cores", lambda: 8)
    for given in ("", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert default_threads(1) == 8
        assert default_threads(3) == 2
        assert default_threads(16) == 1
        assert default_threads(2, own=4) == 2  # torch takes no second thread on a core
        assert default_threads(1, own=64) == 8  # and knows of no quota
    for given in ("3", "3,2", " 03 "):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert default_threads(1, own=3) == default_threads(4) == 3


def test_machine_is_described_by_plain_values():
    facts = describe_machine()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]
    assert facts["usable_cores"] == count_cores() >= 1


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Set which folders take files, and TMPDIR."""

    def set_places(*writable: str, given: str = "") -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", given)

        def open_file(dir: str):
            if dir not in writable:
                raise OSError(30, "Read-only file system")
            return (tmp_path / "file").open("wb")

        monkeypatch.setattr(tempfile, "TemporaryFile", open_file)

    return set_places


def test_where_no_folder_is_for_temporary_files_that_of_the_runs_is(places, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "MAX_TEMPORARY", 200)
    runs = tmp_path / "new" / "runs"
    places(str(runs / ".tmp"))
    choose_temporary_folder(runs)
    assert (runs / ".tmp").is_dir()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(runs / ".tmp")
    places()
    with pytest.raises(BadInput, match=r"^TMPDIR, /tmp and .*runs/.tmp: each is full, .* try TMPDIR=FOLDER$"):
        choose_temporary_folder(runs)


def test_a_temporary_folder_that_serves_stays_and_one_too_long_for_sockets_is_told(places, tmp_path):
    places("/tmp", "/short", given="/short")
    choose_temporary_folder(tmp_path)
    assert (os.environ["TMPDIR"], tempfile.tempdir) == ("/short", None)
    long = "/" + "x" * 97
    places("/tmp", long, given=long)
    with pytest.warns(UserWarning, match=f"^TMPDIR={long} is full, .* than 75 characters; .* lie in /tmp$"):
        choose_temporary_folder(tmp_path)
    assert (os.environ["TMPDIR"], tempfile.tempdir) == ("/tmp", "/tmp")
    places("/tmp")
    choose_temporary_folder(tmp_path)
    assert (os.environ["TMPDIR"], tempfile.tempdir) == ("", None)
