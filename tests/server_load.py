"""What a tracking store bears: many runs at once on it, and as many points as it takes.

    python tests/server_load.py STORE NUM_RUNS [--at-once N] [--restart] [--seconds S]

STORE is `sqlite` (the file), `server-sqlite` (MLflow's server on such a file) or `server` (that of
scripts/server/compose.yaml, on a PostgreSQL). Each run is compared with one that ran alone. `--restart`
crashes the database and, once it is back, the server, in the middle. Where the machine is busy, CPU seconds
tell more than those of the clock.
"""

import argparse
import multiprocessing
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from process import Trainees, TrialResult
from team_server import SECRETS, team_server
from ui_server import mlflow

POINTS = "SELECT run_uuid, key, step, value, is_nan FROM metrics"
CONFIG = ("data=table", "data.batch_size=8", "trainer.max_epochs=40", "num_threads=1")
QUIET = ("trainer.enable_progress_bar=false", "tracking.figures=false")
ACCOUNT = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": SECRETS["ADMIN_PASSWORD"]}
NUM_WRITERS = 4
CHUNK = 1000  # points


@contextmanager
def open_store(kind: str, folder: Path, template: Path) -> Iterator[Any]:
    """Give the URI, how to query the database, and how to restart all of it."""
    path = folder / "store" / "mlflow.db"
    path.parent.mkdir()

    def ask(sql: str) -> list[tuple]:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            return connection.execute(sql).fetchall()

    if kind == "server":
        with team_server(folder, num_workers=2) as server:

            def restart() -> None:
                server.database.stop()
                time.sleep(5)
                server.database.start()
                time.sleep(5)
                server.kill()
                time.sleep(5)
                server.start()

            yield SimpleNamespace(uri=server.uri, ask=server.query, restart=restart)
        return
    shutil.copy(template, path)
    if kind == "sqlite":
        yield SimpleNamespace(uri=f"sqlite:///{path}", ask=ask, restart=None)
        return
    words = ["server", "--backend-store-uri", f"sqlite:///{path}", "--workers", "2"]
    words += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    with mlflow(*words, health="/health", log=folder / "log") as uri:
        yield SimpleNamespace(uri=uri, ask=ask, restart=None)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of MLflow's server and of PostgreSQL, with all that they started."""
    spent = {"mlflow": 0.0, "postgres": 0.0}
    for process in psutil.process_iter(["cmdline", "name"]):
        line = " ".join(process.info["cmdline"] or [])
        if "mlflow server" in line and process.ppid() == os.getpid():
            spent["mlflow"] += _seconds_of([process, *process.children(recursive=True)])
        elif process.info["name"] == "postgres" and f"-D {tempfile.gettempdir()}" in line:
            spent["postgres"] += _seconds_of([process, *process.children(recursive=True)])
            times = process.cpu_times()
            spent["postgres"] += times.children_user + times.children_system
    return spent


def _seconds_of(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (each.cpu_times() for each in processes))


def train_many(opened: Any, trainees: Trainees, folder: Path, num: int, at_once: int, restarts: bool) -> None:
    """Train the same run many times, and compare what each stored."""
    alone = trainees.train(folder / "alone", *CONFIG, *QUIET)
    assert alone.exit_code == 0, alone.stderr
    wanted = [(key, step, value, bool(nan)) for key, step, value, nan in TrialResult(folder / "alone").points]
    before, start_s = cpu_seconds(), time.monotonic()
    going, codes = [], []
    for number in range(num):
        words = (*CONFIG, *QUIET, f"tracking.uri={opened.uri}")
        going.append(trainees.start(folder / "runs", words, log=folder / f"process-{number}"))
        if restarts and number == num // 2:
            while len(opened.ask("SELECT 1 FROM runs")) <= number:
                time.sleep(0.05)
            running = opened.ask("SELECT 1 FROM runs WHERE status = 'RUNNING'")
            print(f"restarted while {len(running)} runs were RUNNING")
            opened.restart()
        while len(going) >= (at_once if number < num - 1 else 1):
            codes += [each.exit_code for each in going if each.exit_code is not None]
            going = [each for each in going if each.exit_code is None]
            time.sleep(0.05)
    wall_s = time.monotonic() - start_s
    spent = {name: s - before[name] for name, s in cpu_seconds().items()}
    found: dict[str, list] = {}
    for run_id, *point in opened.ask(POINTS):
        found.setdefault(run_id, []).append((*point[:3], bool(point[3])))
    states = [state for (state,) in opened.ask("SELECT status FROM runs WHERE lifecycle_stage = 'active'")]
    same = sum(sorted(points) == sorted(wanted) for points in found.values())
    print(
        f"{num} runs, {at_once} at once: exit 0 {codes.count(0)},"
        f" FINISHED {states.count('FINISHED')} of {len(states)}"
    )
    print(f"with all points, once each: {same}; {len(wanted)} points a run; {wall_s:.0f} s")
    print("CPU s a run:", {name: round(s / num, 2) for name, s in spent.items()})
    errors = [(folder / f"process-{n}" / "stderr").read_text() for n in range(num)]
    print({text.splitlines()[-1] for text in errors if "error: " in text})
    print(
        "warned:",
        sum("takes nothing now" in text for text in errors),
        "Traceback:",
        sum("Traceback" in t for t in errors),
    )


def write(uri: str, directory: Path, seconds: float, counts: Any, number: int) -> None:
    """Log points as fast as the store takes them."""
    from tracklight.tracking.store import connect

    run = connect(uri, directory).create("load", None, {})
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        run.log_series("train/loss", range(step, step + CHUNK), [0.5] * CHUNK)
        assert run.flush(60)
        step += CHUNK
    counts[number] = step
    run.finish("FINISHED")


def saturate(opened: Any, folder: Path, seconds: float) -> None:
    """Let several processes log points only."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", NUM_WRITERS)
    before = cpu_seconds()
    writers = [
        context.Process(target=write, args=(opened.uri, folder / "load", seconds, counts, number))
        for number in range(NUM_WRITERS)
    ]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    spent = {name: s - before[name] for name, s in cpu_seconds().items()}
    total = sum(counts)
    (stored,) = opened.ask(
        "SELECT count(*) FROM metrics JOIN runs USING (run_uuid) JOIN experiments"
        " USING (experiment_id) WHERE experiments.name = 'load'"
    )[0]
    print(
        f"{NUM_WRITERS} writers: {total:,} points in {seconds:.0f} s"
        f" ({total / seconds:,.0f} a second), {stored:,} stored"
    )
    print("points a CPU second:", {name: round(total / s) for name, s in spent.items() if s})


def main() -> None:
    """Measure one store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", choices=["sqlite", "server-sqlite", "server"])
    parser.add_argument("num_runs", type=int)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--seconds", type=float, default=15)
    args = parser.parse_args()
    os.environ |= ACCOUNT | {"OMP_NUM_THREADS": "1"}
    folder = Path(tempfile.mkdtemp())
    from tracklight.tracking import mlflow_client

    mlflow_client.create_database(folder / "mlflow.db", (folder / "runs" / "artifacts").as_uri())
    print("load", os.getloadavg(), flush=True)
    with open_store(args.store, folder, folder / "mlflow.db") as opened:
        trainees = Trainees(folder / "mlflow.db", **ACCOUNT)
        try:
            train_many(opened, trainees, folder, args.num_runs, args.at_once, args.restart)
        finally:
            trainees.close()
        saturate(opened, folder, args.seconds)
    print("load", os.getloadavg())
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
