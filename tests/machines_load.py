"""How long one sweep takes on one machine and on two: processes with a tracking directory and a core each.

    python tests/machines_load.py [--trials N] [--epochs N | --wait S] [--rounds N]

They share Optuna's storage on a PostgreSQL, and an MLflow server. Each trial takes a core all the time, or
with `--wait` sleeps for so many seconds: where the machine is busy, that tells how well the sweep is shared
out.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from process import Trainees, free_port
from sweep.commands import BLOBS, ODD, Swept
from team_server import PostgreSQL

HOUR_S = 3600.0
ODD_EPOCHS = 5


def measure(trainees: Trainees, folder: Path, storage: str, names: str, words: list[str]) -> float:
    """Run a sweep on these machines; return the seconds until the last of them has ended."""
    port = free_port()
    server = trainees.serve(folder / "server", port)
    shared = (f"tracking.uri=http://127.0.0.1:{port}", f"sweep.storage={storage}", "sweep.workers=1")
    before, start_s = os.getloadavg()[0], time.monotonic()
    going = [
        trainees.start(folder / name, ("-m", *words, *shared), log=folder / f"{name}.log") for name in names
    ]
    assert [each.wait(HOUR_S) for each in going] == [0] * len(names), [each.stderr for each in going]
    seconds = time.monotonic() - start_s
    server.send(signal.SIGTERM)
    server.wait()
    children = Swept(folder / "server").children
    runs = [{path.parent.name for path in (folder / name).glob("artifacts/*/points.wal")} for name in names]
    shares = [sum(run.run_id in each for run in children) for each in runs]
    assert {run.status for run in children} == {"FINISHED"}
    points = len({run.tags["tracklight.point"] for run in children})
    said = f"{len(children)} trials, {points} of them different, {shares} on each"
    begun_s = sorted(run.start / 1000 for run in children)
    rate = 60 * (len(children) - len(names)) / (begun_s[-1] - begun_s[0])
    said += f", {rate:.1f} begun a minute from the first to the last"
    print(
        f"{' and '.join(names)}: {seconds:.1f} s, {said}; load {before:.1f} to {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return seconds


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--wait", type=float)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    from tracklight.tracking import mlflow_client

    mlflow_client.create_database(folder / "mlflow.db", (folder / "runs" / "artifacts").as_uri())
    database, trainees = PostgreSQL("me"), Trainees(folder / "mlflow.db", OMP_NUM_THREADS="1")
    found: dict[str, list[float]] = {"a": [], "ab": []}
    try:
        for number in range(args.rounds):
            for names in ("a", "ab") if number % 2 == 0 else ("ab", "a"):
                lrs = ",".join(f"{0.001 * each:.3f}" for each in range(1, args.trials + 1))
                words = [*BLOBS, f"trainer.max_epochs={args.epochs}"]
                if args.wait is not None:
                    words = [*ODD, f"+model.seconds={args.wait / ODD_EPOCHS}"]
                words += [
                    f"optimizer.lr={lrs}",
                    f"seed={len(found['a'] + found['ab'])}",
                ]  # a sweep of its own
                place = folder / f"{number}-{names}"
                found[names].append(measure(trainees, place, database.url, names, words))
    finally:
        trainees.close()
        database.close()
        shutil.rmtree(folder)
    one, two = sum(found["a"]), sum(found["ab"])
    print(f"two machines take {two / one:.3f} of the time of one, {two / one * 2 - 1:+.1%} over half of it")


if __name__ == "__main__":
    sys.exit(main())
