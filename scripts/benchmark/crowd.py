"""Fills a store with copies of the one run that is in it, by plain SQL."""

import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

POINT_EVERY = 100  # steps: a copy keeps so few of the points, or the file would take gigabytes
OWN = {  # table: column that names the run, and what else is different in each copy
    "runs": ("run_uuid", {"artifact_uri": "replace(artifact_uri, :run, copies.id)"}),
    "params": ("run_uuid", {}),
    "tags": (
        "run_uuid",
        {"value": "CASE key WHEN 'tracklight.key' THEN copies.id ELSE value END"},
    ),
    "latest_metrics": ("run_uuid", {}),
    "metrics": ("run_uuid", {}),
    "inputs": ("destination_id", {"input_uuid": "copies.id"}),
    "logged_models": ("source_run_id", {"model_id": "'m-' || copies.id"}),
}


def crowd(directory: Path, number: int) -> None:
    """Copy the only run in the store of a tracking directory, rows and folder, so many times."""
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection, connection:
        ((run,),) = connection.execute("SELECT run_uuid FROM runs").fetchall()
        connection.execute("CREATE TEMPORARY TABLE copies (id TEXT PRIMARY KEY)")
        names = [uuid.uuid4().hex for _ in range(number)]
        connection.executemany("INSERT INTO copies VALUES (?)", [(name,) for name in names])
        for table, (owner, changes) in OWN.items():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = {owner: "copies.id"} | changes
            chosen = ", ".join(values.get(column, f'"{column}"') for column in columns)
            some = f"AND step % {POINT_EVERY} = 0" if table == "metrics" else ""
            connection.execute(
                f"INSERT INTO {table} SELECT {chosen} FROM {table}, copies WHERE {owner} = :run {some}",
                {"run": run},
            )
    for name in names:
        artifacts = directory / "artifacts" / name / "artifacts"
        artifacts.mkdir(parents=True)
        (artifacts.parent / "points.wal").touch()
