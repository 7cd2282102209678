"""A stored config is data: whatever text it holds, nothing of it runs and nothing is looked up."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from small_runs import QUICK, train

from process import Trainees, free_port
from tracklight.commands.parser import main
from tracklight.config.compose import allowed_targets, compose
from tracklight.errors import BadInput
from tracklight.tracking.store import Store, connect

SECRET = "-".join(["pl4nt3d", "s3cr3t"])  # this file may be part of a run's patch
EXEC = "_target_: mlflow.utils.process._exec_cmd, cmd: [touch, {ran}]"
ATTACKS = {
    "resolved twice": r"\${{oc.create:{{" + EXEC + "}}}}",
    "resolved three times": r"\\\${{oc.create:{{" + EXEC + "}}}}",
    "resolved at once": "${{oc.create:{{" + EXEC + "}}}}",
    "read from the environment": "${{oc.env:AWS_SECRET_ACCESS_KEY}}",
    "decoded": r"\${{oc.decode:'${{oc.env:AWS_SECRET_ACCESS_KEY}}'}}",
    "another key": "${{seed}}",
}
PLACES = (("model", "bias"), ("data", "num_points"), ("tracking", "run_name"))
COMMANDS = ("evaluate", "predict", "reproduce", "resume")


def plant(config: Path, place: tuple[str, str], text: str, ran: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree[place[0]][place[1]] = text.format(ran=ran)
    config.write_text(yaml.safe_dump(tree))


def start(command: str, run_id: str, directory: Path, uri: str | None = None) -> None:
    where = ["--dir", str(directory), *(["--uri", uri] if uri else [])]
    match command:
        case "evaluate":
            main("evaluate", [run_id, *where])
        case "predict":
            rows = directory / "rows.csv"
            rows.write_text("x\n1\n")
            main("predict", [run_id, str(rows), *where])
        case "reproduce":
            main("reproduce", [run_id, *where])
        case _:
            from tracklight.experiment.train import run

            cfg = compose([f"tracking.dir={directory}", f"tracking.uri={uri or 'null'}", *QUICK])
            cfg.resume = run_id
            run(cfg)


def assert_refused(command: str, run_id: str, directory: Path, ran: Path, uri=None) -> None:
    with pytest.raises(BadInput, match=r"(model\.bias|data\.num_points|tracking\.run_name)=") as no:
        start(command, run_id, directory, uri)
    assert "'${' is refused" in str(no.value)
    assert SECRET not in str(no.value)
    assert "\n" not in str(no.value)
    assert not ran.exists()


def files_with(folder: Path, text: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("command", COMMANDS)
def test_text_of_a_stored_config_is_never_resolved(kept, copied, tmp_path, attack, command, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ran = tmp_path / "ran"
    config = copied / "artifacts" / kept.line / "artifacts" / "config.yaml"
    before = config.read_text()
    for place in PLACES:
        config.write_text(before)
        plant(config, place, ATTACKS[attack], ran)
        if place[0] == "tracking" and attack == "another key":
            continue
        assert_refused(command, kept.line, copied, ran)
    assert files_with(copied, SECRET) == []


@pytest.mark.server
@pytest.mark.slow
def test_text_of_a_config_on_a_server_is_never_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    trainees, port = Trainees(tmp_path / "template"), free_port()
    (tmp_path / "template").mkdir(exist_ok=True)
    server = trainees.serve(tmp_path / "server", port)
    uri = f"http://127.0.0.1:{port}"
    try:
        run_id = train(tmp_path / "trained", "trainer.max_epochs=2", uri=uri)
        store: Store = connect(uri, tmp_path / "away")
        (config,) = (tmp_path / "server").rglob(f"{run_id}/artifacts/config.yaml")
        before = config.read_text()
        for text in ATTACKS.values():
            config.write_text(before)
            plant(config, PLACES[0], text, tmp_path / "ran")
            for command in COMMANDS:
                assert_refused(command, run_id, tmp_path / "away", tmp_path / "ran", uri)
        assert files_with(tmp_path, SECRET) == []
        assert store.client.get_run(run_id).info.status == "FINISHED"
    finally:
        server.send(signal.SIGKILL, group=True)
        trainees.close()


def test_the_planted_command_would_leave_its_mark(tmp_path):
    """The oracle of the tests above: what they plant does run where something builds it."""
    from mlflow.utils.process import _exec_cmd

    _exec_cmd(["touch", str(tmp_path / "ran")])
    assert (tmp_path / "ran").exists()
    assert "mlflow" not in allowed_targets()
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != SECRET


def test_a_secret_that_ones_own_conf_reads_is_used_and_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    read = "${oc.env:AWS_SECRET_ACCESS_KEY}"
    words = [f"+score.note={read}", f"tracking.run_name={read}", "trainer.max_epochs=1"]
    assert compose(words).score.note == SECRET
    train(tmp_path / "runs", *words)
    assert files_with(tmp_path, SECRET) == []
