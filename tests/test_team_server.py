"""Every command, and faults, on the server that scripts/server/compose.yaml starts."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from process import Process, Trainees, TrialResult
from team_server import SECRETS, TeamServer, team_server
from tracklight.commands.parser import main

pytestmark = [pytest.mark.server, pytest.mark.slow]
USER, PASSWORD, WRONG = "ada", "Zq7lovelace-77d0", "Zq7wrong-password-1b"
ACCOUNT = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
QUICK = ("num_threads=1", "trainer.enable_progress_bar=false", "tracking.figures=false")
TABLE = ("data=table", "trainer.max_epochs=20", *QUICK)
BATCH_END = "tracklight.engine.blocks:Blocks.on_train_batch_end"
HURRIED = [
    ["spare_model"],
    ["put", "tracklight.engine.checkpoint_io:INTERVAL_S", 0.0],
    ["put", "tracklight.tracking.store:_TIMEOUT_S", {"server": 5.0}],
    ["put", "tracklight.tracking.sender:_PERIOD_S", 0.05],
    ["put", "tracklight.tracking.sender:_MAX_BACK_OFF_S", 0.2],
]
SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"}
COLUMNS = "age,sex,bmi,bp,s1,s2,s3,s4,s5,s6"
ROW = "59,2,32.1,101,157,93.2,38,4,4.8598,87"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TeamServer]:
    with team_server(tmp_path_factory.mktemp("team")) as server:
        server.add_user(USER, PASSWORD)
        yield server


@pytest.fixture
def env(server, monkeypatch) -> dict[str, str]:
    """The environment of the user, which the commands of this process get, too."""
    env = {"MLFLOW_TRACKING_URI": server.uri, **ACCOUNT}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


@pytest.fixture(scope="module")
def trainees(template) -> Iterator[Trainees]:
    """As elsewhere, with the user's account: the trials of a sweep have the environment of all."""
    trainees = Trainees(template, **ACCOUNT)
    yield trainees
    trainees.close()


def runs(server: TeamServer, experiment: str) -> list[tuple[str, str]]:
    """The id and the status of each run, the first one first."""
    return server.query(
        "SELECT run_uuid, status FROM runs JOIN experiments USING (experiment_id)"
        " WHERE experiments.name = %s ORDER BY start_time",
        experiment,
    )


def points(server: TeamServer, run_id: str) -> list[tuple]:
    found = server.query("SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = %s", run_id)
    return sorted(found)


def undisturbed(trainees, directory: Path, *words: str, faults=()) -> TrialResult:
    """The same run on an SQLite file, in one piece."""
    process = trainees.train(directory, *words, faults=faults)
    assert process.exit_code == 0, process.stderr
    return TrialResult(directory)


def ended_well(process: Process) -> Process:
    assert process.exit_code == 0 and "Traceback" not in process.stderr, process.stderr + process.stdout
    return process


def test_all_commands_work_for_a_user_on_postgresql_and_s3(server, env, trainees, tmp_path, capsys):
    mine = ("tracking=server", "tracking.experiment=commands")
    local = undisturbed(trainees, tmp_path / "local", *TABLE, "tracking.experiment=commands")
    ended_well(trainees.train(tmp_path / "here", *TABLE, *mine, env=env))
    ((run_id, status),) = runs(server, "commands")
    assert status == "FINISHED" and points(server, run_id) == local.points != []
    ended_well(trainees.sweep(tmp_path / "here", "optimizer.lr=0.01,0.05", *TABLE, *mine, env=env))
    assert [status for _, status in runs(server, "commands")] == ["FINISHED"] * 4

    away = ["--dir", str(tmp_path / "elsewhere")]  # where nothing of these runs is
    assert main("compare", ["--json", "--each", "--metric", "score", *away]) == 0
    ranked = [run for place in json.loads(capsys.readouterr().out) for run in place["runs"]]
    assert run_id in ranked and len(ranked) == 3
    assert main("evaluate", [run_id, *away]) == 0
    assert "the same to the bit" in capsys.readouterr().out
    (tmp_path / "rows.csv").write_text(f"{COLUMNS}\n{ROW}\n")
    source = ["--dir", str(local.directory), "--uri", f"sqlite:///{local.directory}/mlflow.db"]
    answers = []
    for where in ([run_id, *away], [local.run_id, *source]):
        assert main("predict", [*where, str(tmp_path / "rows.csv"), "--format", "csv"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main("reproduce", [run_id, "trainer.enable_progress_bar=false", *away]) == 0
    assert "identical: " in capsys.readouterr().out
    for num_copied in (1, 0):
        assert main("push", [server.uri, *source]) == 0
        assert f"{num_copied} copied to" in capsys.readouterr().out.splitlines()[-1]
    (pushed,) = server.query("SELECT run_uuid FROM tags WHERE value = %s", local.run_id)
    assert points(server, *pushed) == local.points
    stored = server.objects()
    for each in (run_id, *pushed):
        (key,) = [key for key in stored if each in key and key.endswith("checkpoints/best.ckpt")]
        assert len(stored[key]) > 1000


def test_a_database_restarted_and_a_server_killed_in_mid_run_lose_and_double_nothing(
    server, env, trainees, tmp_path
):
    words = ("data=table", "data.batch_size=8", "trainer.max_epochs=40", *QUICK, "tracking.experiment=outage")
    local = undisturbed(trainees, tmp_path / "local", *words, faults=HURRIED[:2])
    marks = [tmp_path / f"mark-{number}" for number in range(4)]
    meetings = [["meet", BATCH_END, 8 * (number + 1), str(mark)] for number, mark in enumerate(marks)]
    process = trainees.start(
        tmp_path / "here", (*words, "tracking=server"), [*HURRIED, *meetings], {**env, **SHORT}
    )
    process.wait_for(marks[0])
    (run_id,) = [run_id for run_id, _ in runs(server, "outage")]
    wait_until(lambda: points(server, run_id))
    server.database.stop()
    marks[0].unlink()
    process.wait_for(marks[1])
    wait_until(lambda: "takes nothing now" in process.stderr)
    server.database.start()
    wait_until(lambda: "answers again" in process.stderr)
    before = len(points(server, run_id))
    marks[1].unlink()
    process.wait_for(marks[2])
    server.kill()
    marks[2].unlink()
    process.wait_for(marks[3])
    wait_until(lambda: process.stderr.count("takes nothing now") == 2)
    server.start()
    assert before <= len(points(server, run_id)) < len(local.points)
    marks[3].unlink()
    process.wait()
    ended_well(process)
    assert runs(server, "outage") == [(run_id, "FINISHED")]
    assert points(server, run_id) == local.points


@pytest.mark.parametrize(
    "words, user",
    [
        (("tracking=server",), USER),
        (("-m", "seed=1,2"), USER),
        (("resume=auto",), "nobody"),
        (("init_from=last",), ""),
    ],
)
def test_a_wrong_password_is_one_line_and_no_run(server, trainees, tmp_path, words, user):
    env = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_TRACKING_USERNAME": user}
    env["MLFLOW_TRACKING_PASSWORD"] = WRONG if user else ""
    process = trainees.train(tmp_path / "here", *words, "tracking.experiment=refused", env=env)
    assert process.exit_code == 2, process.stderr + process.stdout
    assert process.stderr.count("\n") == 1 and "Traceback" not in process.stderr
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in process.stderr
    assert WRONG not in process.stderr + process.stdout
    assert runs(server, "refused") == [] and not list(tmp_path.glob("here/artifacts/*/*"))


@pytest.mark.parametrize("where", ["environment", "address"])
def test_no_password_is_in_what_a_run_shows_or_stores(server, env, trainees, tmp_path, where):
    words = ["trainer.max_epochs=3", *QUICK, f"tracking.experiment={where}", "tracking.run_name=Zq7name"]
    if where == "address":
        words.append(f"tracking.uri=http://{USER}:{PASSWORD}@127.0.0.1:{server.port}")
        env = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""}
    process = ended_well(trainees.train(tmp_path / "here", *words, env=env))
    assert [status for _, status in runs(server, where)] == ["FINISHED"]
    found = {"output": process.stdout + process.stderr}
    found |= {str(p): p.read_bytes().decode("latin") for p in tmp_path.rglob("*") if p.is_file()}
    found |= {key: body.decode("latin") for key, body in server.objects().items()}
    for (table,) in server.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        found[table] = "\n".join(row for (row,) in server.query(f'SELECT t::text FROM "{table}" t'))
    assert "Zq7name" in found["runs"] and len(found) > 50  # what is there would be found
    for secret in (PASSWORD, *SECRETS.values()):
        assert [name for name, text in found.items() if secret in text] == []


def wait_until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
