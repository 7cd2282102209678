"""A stored config is data: whatever text it holds, nothing of it runs and nothing is looked up."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from small_runs import QUICK, train

from process import Trainees, free_port
from tracklight.commands.parser import main
from tracklight.config.compose import allowed_targets, check_stored_paths, compose
from tracklight.config.types import LOADER
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.stored import load_config
from tracklight.experiment.train import run as run_experiment
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
BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
BROKEN: dict[str, bytes | str] = {
    "empty": "",
    "a list": "- seed: 1",
    "a number": "42",
    "cut off": "{seed: [1,",
    "no text": b"\xff\xfe\x00",
    "a billion aliases": BILLION,
    "itself": "seed: &seed [*seed]",
    "deep lists": "seed: " + "[" * 200_000,
    "deep mappings": "seed: " + "{a: " * 200_000,
    "a python object": "seed: !!python/object/apply:os.system [touch]",
    "a long number": "seed: " + "9" * 10_000,
    "no day": "seed: 2001-99-99",
    "bytes": "seed: !!binary aGk=",
    "a set": "seed: !!set {1, 2}",
    "a key that is none": "? [a, b]\n: 1",
    "an empty mapping": "{}",
}
PLACES = (("model", "bias"), ("data", "num_points"), ("tracking", "run_name"))
COMMANDS = ("evaluate", "predict", "reproduce", "resume")


def plant(config: Path, place: tuple[str, str], text: str, ran: Path) -> None:
    tree = yaml.load(config.read_text(), LOADER)
    tree[place[0]][place[1]] = text.format(ran=ran)
    config.write_text(json.dumps(tree))


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
            cfg = compose([f"tracking.dir={directory}", f"tracking.uri={uri or 'null'}", *QUICK])
            cfg.resume = run_id
            run_experiment(cfg)


def assert_refused(command: str, run_id: str, directory: Path, ran: Path, uri=None) -> None:
    with pytest.raises(BadInput, match=r"(model\.bias|data\.num_points|tracking\.run_name)=") as no:
        start(command, run_id, directory, uri)
    assert "'${' is refused" in str(no.value)
    assert SECRET not in str(no.value)
    assert "\n" not in str(no.value)
    assert not ran.exists()


def sparse(path: Path) -> None:
    """A file of ten gigabytes that takes no place on the disk."""
    path.unlink()
    path.touch()
    os.truncate(path, 10_000_000_000)


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


ODD_FILES: dict[str, Callable[[Path], None]] = {
    "ten gigabytes": sparse,
    "a pipe": lambda path: replaced(path, os.mkfifo),
    "a device": lambda path: replaced(path, lambda p: p.symlink_to("/dev/zero")),
    "a folder": lambda path: replaced(path, Path.mkdir),
    "a link to elsewhere": lambda path: replaced(path, lambda p: p.symlink_to("/etc/hostname")),
}


def assert_one_line(command: str, run_id: str, directory: Path, uri=None, says: str = "") -> None:
    assert_no_config(lambda: start(command, run_id, directory, uri), says)


@pytest.fixture
def config(kept, copied) -> Path:
    return copied / "artifacts" / kept.line / "artifacts" / "config.yaml"


def load(kept, copied):
    store = connect(None, copied)
    run = kept.store.client.get_run(kept.line)
    return lambda: load_config(store, run)


def assert_no_config(read: Callable[[], object], says: str = "config.yaml") -> None:
    start_s = time.monotonic()
    with pytest.raises(BadInput, match=says) as no:
        read()
    assert "\n" not in str(no.value) and len(str(no.value)) < 600
    assert time.monotonic() - start_s < 20


def test_a_stored_config_that_is_none_is_refused_in_one_line(kept, copied, config):
    before, read = config.read_bytes(), load(kept, copied)
    for text in BROKEN.values():
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert_no_config(read)
    for spoil in ODD_FILES.values():
        spoil(config)
        assert_no_config(read)
        config.rmdir() if config.is_dir() else config.unlink()
        config.write_bytes(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_hangs_on_a_stored_config_that_never_ends(kept, copied, config, command):
    config.write_text(BILLION)
    assert_one_line(command, kept.line, copied, says="config.yaml is no config: line 2: an alias")


def test_whatever_key_a_stored_config_lacks_or_holds_it_is_one_line(kept, copied, config):
    tree, read = yaml.load(config.read_text(), LOADER), load(kept, copied)
    for key in ("seed", "trainer", "model", "data", "optimizer", "scheduler", "score", "callbacks"):
        without = {name: value for name, value in tree.items() if name != key}
        config.write_text(json.dumps(without))
        assert_no_config(read, f"config.yaml has no {key}")
        for value in (None, [1]) if key in ("seed", "trainer", "model") else ():
            config.write_text(json.dumps({**without, key: value}))
            assert_no_config(read, key)
    for section in ("model", "optimizer"):  # without a class
        config.write_text(json.dumps({**tree, section: {"_target_": None}}))
        assert_one_line("predict", kept.line, copied, says=f"{section}._target_ is missing")


@pytest.mark.parametrize("spoil", ODD_FILES.values(), ids=ODD_FILES)
def test_stored_weights_that_are_no_file_of_bounded_size_are_refused(kept, copied, spoil, monkeypatch):
    monkeypatch.setenv("TRACKLIGHT_MAX_CHECKPOINT_GB", "8")
    spoil(copied / "artifacts" / kept.line / "artifacts" / "checkpoints" / "best.ckpt")
    for command in ("evaluate", "predict"):
        assert_one_line(command, kept.line, copied, says="best.ckpt")


@pytest.mark.parametrize(
    "inputs",
    [
        *("", "[]", "7", "{", '{"name": ' + "[" * 100_000, '{"in_features": ' + "9" * 10_000 + "}"),
        *({"shape": "ab"}, {"shape": [2**30]}, {"feature_names": "x"}, {"feature_names": [1]}),
        *({"target_names": [["y"]]}, {"mean": [0.0, 1.0]}, {"std": {}}, {"name": [1]}, {"in_features": "1"}),
        *(
            {"feature_names": None},
            {"feature_names": []},
            {"feature_names": ["x", "x"]},
            {"target_names": []},
        ),
    ],
)
def test_stored_metadata_of_any_kind_are_used_or_refused_in_one_line(kept, copied, inputs, capsys):
    path = copied / "artifacts" / kept.table / "artifacts" / "inputs.json"
    whole = json.loads(path.read_text())
    path.write_text(inputs if isinstance(inputs, str) else json.dumps(whole | inputs))
    rows = copied / "rows.csv"
    rows.write_text(",".join(whole["feature_names"]) + "\n" + ",".join("1" * 10) + "\n")
    try:
        assert main("predict", [kept.table, str(rows), "--dir", str(copied)]) == 2
        said = capsys.readouterr().err.removesuffix("\n")
    except BadInput as no:
        said = str(no)
    assert said and "\n" not in said


WRITERS = {
    "callbacks.kept.dirpath": ("ModelCheckpoint", {"dirpath": "{out}"}),
    "callbacks.kept.filename": ("ModelCheckpoint", {"filename": "../../{name}"}),
    "callbacks.read.filename": ("ModelCheckpoint", {"filename": "{{epoch].__class__.__mro__[0}}"}),
    "callbacks.wide.filename": ("ModelCheckpoint", {"filename": "{{epoch:>9999999999}}"}),
    "callbacks.relative.dirpath": ("ModelCheckpoint", {"dirpath": "out"}),
    "callbacks.listed._args_": ("ModelCheckpoint", {"_args_": ["out", "name"]}),
    "callbacks.failed.dirpath": ("OnExceptionCheckpoint", {"dirpath": "{out}"}),
    "callbacks.remote.dirpath": ("ModelCheckpoint", {"dirpath": "memory://out"}),
    "trainer.profiler.dirpath": ("SimpleProfiler", {"dirpath": "{out}", "filename": "profile"}),
    "trainer.profiler.filename": ("AdvancedProfiler", {"dirpath": None, "filename": "{out}/profile"}),
}


@pytest.mark.parametrize("key", WRITERS)
def test_a_stored_config_writes_nowhere_but_into_the_runs_folder(kept, copied, tmp_path, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, arguments = WRITERS[key]
    section, name_of_node, last = key.split(".")
    values = {
        k: v.format(out=tmp_path / "out", name="out") if isinstance(v, str) else v
        for k, v in arguments.items()
    }
    kind = "callbacks" if section == "callbacks" else "profilers"
    config = copied / "artifacts" / kept.line / "artifacts" / "config.yaml"
    tree = yaml.load(config.read_text(), LOADER)
    tree[section][name_of_node] = {"_target_": f"pytorch_lightning.{kind}.{name}", **values}
    config.write_text(json.dumps(tree))
    before = {*tmp_path.iterdir()}
    for command in ("reproduce", "resume"):
        assert_one_line(
            command, kept.line, copied, says=f"{key}.*=.* of the stored config may write or read outside"
        )
    assert main("evaluate", [kept.line, "--no-log", "--dir", str(copied)]) == 0  # it makes none of them
    assert {*tmp_path.iterdir()} == before
    if key == "callbacks.kept.dirpath":
        word = f"{key}={values[last]}"
        assert main("reproduce", [kept.line, word, "--dir", str(copied)]) == 0
        assert (tmp_path / "out").is_dir()


def test_a_stored_file_name_reads_nothing_but_metrics(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    name = "{epoch].backward.__globals__[torch].os.environ[AWS_SECRET_ACCESS_KEY}"
    read = ModelCheckpoint(filename=name, auto_insert_metric_name=False)
    assert SECRET in read.format_checkpoint_name({"epoch": torch.tensor(1)})  # what Lightning makes of it
    for text, is_refused in (
        (name, True),
        ("{epoch}-{val/loss:.2f}", False),
        ("{step:06d}-[{epoch}]", False),
    ):
        stored = {"callbacks": {"best": {"filename": text}}}
        try:
            check_stored_paths(stored, [], Path("/store/artifacts/run"))
        except BadInput as no:
            assert is_refused and "may write or read outside" in str(no)
        else:
            assert not is_refused
    check_stored_paths({"callbacks": {"best": {"filename": name}}}, ["callbacks.best.filename=x"], Path())


def spoil_last(copied: Path, run_id: str, change: Callable[[dict], None]) -> None:
    last = copied / "artifacts" / run_id / "artifacts" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    change(checkpoint)
    DurableCheckpointIO().save_checkpoint(checkpoint, last)


@pytest.mark.parametrize("way", ["up", "up from another name", "a link"])
def test_a_stored_checkpoint_makes_no_run_delete_a_file_elsewhere(kept, copied, tmp_path, way):
    folder, thesis = copied / "artifacts" / kept.line / "artifacts" / "checkpoints", tmp_path / "thesis.txt"
    thesis.write_text("three years")
    if way == "a link":
        (folder / "out").symlink_to(tmp_path)
    planted = str(folder / ("out/thesis.txt" if way == "a link" else "../../../../../thesis.txt"))
    assert Path(planted).samefile(thesis)

    def change(checkpoint: dict) -> None:
        states = checkpoint["callbacks"]
        (key,) = (each for each in states if each.startswith("BestCheckpoint"))
        worst = torch.tensor(1e9)
        planting = {"kth_best_model_path": planted, "best_k_models": {planted: worst}, "kth_value": worst}
        states[key] |= planting | {"best_model_score": worst, "dirpath": str(folder)}
        if way == "up from another name":
            states[key]["dirpath"] = "/nowhere"

    spoil_last(copied, kept.line, change)
    cfg = compose([f"tracking.dir={copied}", "tracking.uri=null", *QUICK])
    cfg.resume, cfg.overrides = kept.line, ["trainer.max_epochs=9"]
    with pytest.raises((BadInput, RunFailed), match="thesis.txt may be anywhere|out leads out of its folder"):
        run_experiment(cfg)
    assert thesis.read_text() == "three years"


BROKEN_STATES: dict[str, Callable[[dict], Any]] = {
    "a text": lambda checkpoint: checkpoint.update(callbacks="x"),
    "a state that is none": lambda checkpoint: checkpoint["callbacks"].update(ResumeCheckpoint=7),
    "half a state": lambda checkpoint: checkpoint["callbacks"].update(ResumeCheckpoint={"further": []}),
    "no optimizer": lambda checkpoint: checkpoint.pop("optimizer_states"),
    "no loops": lambda checkpoint: checkpoint.update(loops=[1]),
}


@pytest.mark.parametrize("change", BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_a_stored_checkpoint_of_any_content_is_refused_in_one_line(kept, copied, change):
    spoil_last(copied, kept.line, change)
    cfg = compose([f"tracking.dir={copied}", "tracking.uri=null", *QUICK])
    cfg.resume, cfg.overrides = kept.line, ["trainer.max_epochs=9"]
    with pytest.raises((BadInput, RunFailed)) as no:
        run_experiment(cfg)
    assert "\n" not in str(no.value)


def files_with(folder: Path, text: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def pairs(first, second, always):
    """Pair all of one with all of another; those are slow that have no part in `always`."""
    found = [(a, b) for a in first for b in second]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * always.isdisjoint(pair)) for pair in found]


@pytest.mark.parametrize(("command", "attack"), pairs(COMMANDS, ATTACKS, {"resume", "resolved twice"}))
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
def test_text_of_a_config_on_a_server_is_never_resolved(tmp_path, template, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    trainees, port = Trainees(template), free_port()
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
        artifacts = config.parent
        for text in BROKEN.values():
            config.write_bytes(text if isinstance(text, bytes) else text.encode())
            for command in COMMANDS:
                assert_one_line(command, run_id, tmp_path / "away", uri, says="config.yaml")
        sparse(config)
        for command in COMMANDS:
            assert_one_line(command, run_id, tmp_path / "away", uri, says="10,000,000,000 bytes")
        config.write_text(before)
        monkeypatch.setenv("TRACKLIGHT_MAX_CHECKPOINT_GB", "8")
        for path in ("checkpoints/best.ckpt", "checkpoints/last.ckpt"):
            sparse(artifacts / path)
        for command in COMMANDS:
            assert_one_line(command, run_id, tmp_path / "away", uri, says="ckpt has 10,000,000,000 bytes")
        assert sum(p.stat().st_blocks for p in (tmp_path / "away").rglob("*")) * 512 < 1_000_000
        assert files_with(config.parent, SECRET) == []
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
    words = [f"tracking.run_name={read}", "trainer.max_epochs=1"]
    assert compose(words).tracking.run_name == SECRET
    train(tmp_path / "runs", *words)
    assert files_with(tmp_path, SECRET) == []
