"""Each kind of bad input, typed as a user would: one line, exit 2, no run."""

import pickle
import re
import shutil

import pytest
import torch
from configs import MLP, QUICK

from process import TrialResult

TABLE = ("model=linear", "data=table", *QUICK)
COMMANDS = {
    # overrides
    "optimizer.lrr=1": r"optimizer\.lr\b",
    "model=mpl": "linear, mlp",
    "seed=1 seed=2": "twice",
    "seed=": "seed=",
    "seed=1,2": "-m",
    "data.root=${oc.env:NO_SUCH_VARIABLE} model=mlp": "NO_SUCH_VARIABLE",
    # numbers
    **{f"optimizer.lr={value}": "optimizer.lr=" for value in ("abc", "-1", "0", "nan", "inf")},
    **{f"data.batch_size={value}": "data.batch_size=" for value in ("0", "-1", "2.5")},
    **{f"trainer.max_epochs={value}": "trainer.max_epochs=" for value in ("0", "-5")},
    **{f"seed={value}": "seed=" for value in ("-1", str(2**32))},
    **{f"model=mlp model.hidden={value}": "model.hidden=" for value in ("[0]", "[-3]", "[a]")},
    "model=mlp model.dropout=1.5": "model.dropout=1.5",
    "trainer.devices=9 trainer.accelerator=cpu": "trainer.devices=9",
    # targets
    "model._target_=os.system": "allow-list",
    "model=mlp +model.x._target_=torch.load": "allow-list",
    "callbacks=early_stopping +callbacks.a={_target_:os._exit,_partial_:true}": "allow-list",
    # addresses
    "tracking=server": "'MLFLOW_TRACKING_URI' not found; set it, or tracking.uri=VALUE",
    "tracking.uri=ftp://me:hunter2@host/": r"ftp://\*\*\*@host",
    "tracking.uri=http://me:hunter2@127.0.0.1:9": r"no tracking server answers .*\*\*\*@127",
    "tracking.uri=sqlite:///{text}": "is no SQLite database",
    "tracking.dir={text}": "is a file where a folder should be",
    # runs
    "resume=../../etc/passwd": "resume=",
    "resume=abcd": "no run begins with abcd",
    "init_from=abcd": "no run begins with abcd",
}


def refused(process) -> str:
    """The one line of a process that refused its input; its other lines, if any, are warnings."""
    line = process.stderr.splitlines()[-1]
    assert (process.exit_code, line[:7]) == (2, "error: "), process.stderr
    assert "Traceback" not in process.stderr
    assert "hunter2" not in process.stderr + process.stdout
    return line


def test_what_is_typed_wrongly_is_one_line_and_no_run(trainees, tmp_path):
    text, directory = tmp_path / "text", tmp_path / "runs"
    text.write_text("no database")
    for command, said in COMMANDS.items():
        words = command.replace("{text}", str(text)).split()
        # without the directory where the command gives one: no key can be given twice
        own = "tracking.dir" in command
        process = trainees.train(directory, *words, **({"bare": True} if own else {}))
        line = refused(process)
        assert re.search(said, line), (command, line)
        assert process.stderr.count("\n") == 1, (command, process.stderr)
    assert TrialResult(directory).runs == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_where_there_is_none_is_said_and_auto_offered(trainees, tmp_path):
    line = refused(trainees.train(tmp_path / "runs", "trainer.accelerator=gpu"))
    assert "no GPU found on this machine" in line and "trainer.accelerator=auto" in line
    assert TrialResult(tmp_path / "runs").runs == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("x,y\n", "no rows|header"),
        ("x,y\n1,2\n3,nan\n5,6\n", "row|line"),
        ("x,y\n1,2\n3,four\n5,6\n", "four"),
        ("x,y\n1,2\n3\n5,6\n", "row|line"),
        ("x,z\n1,2\n3,4\n5,6\n", "'?y'?"),
        ("x,y\n1,2\n", "1 rows"),
        ("x,y\n7,1\n7,2\n7,3\n7,4\n7,5\n7,6\n7,7\n7,8\n", "constant"),
    ],
)
def test_a_bad_table_is_one_line_and_no_run(trainees, tmp_path, text, said):
    path = tmp_path / "table.csv"
    path.write_text(text)
    process = trainees.train(tmp_path / "runs", *TABLE, f"data.path={path}", "data.target=y")
    assert re.search(said, refused(process)), process.stderr
    assert TrialResult(tmp_path / "runs").runs == []


class Malice:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_bad_checkpoint_to_start_from_is_one_line_and_no_run(trainees, tmp_path):
    directory = tmp_path / "runs"
    trainees.train(directory, *MLP, "trainer.max_epochs=1", faults=[["spare_model"]])
    first = TrialResult(directory)
    best = first.checkpoints / "best.ckpt"
    whole = torch.load(best, weights_only=True)
    kept = shutil.copy(best, tmp_path / "kept")
    best.with_name("best.ckpt.sha256.json").unlink()
    nan = {name: each * float("nan") for name, each in whole["state_dict"].items()}
    few = dict(list(whole["state_dict"].items())[:1])
    for content, said in (
        (b"", "cannot be read: empty, cut off, or no checkpoint"),
        (kept.read_bytes()[:3000], "cannot be read"),
        (b"some text\n", "cannot be read|unsafe content refused"),
        (whole["state_dict"], "holds no `state_dict`"),
        (whole | {"state_dict": few}, "do not fit this model: .*Missing key"),
        (whole | {"state_dict": nan}, "holds NaN"),
        (whole | {"pytorch-lightning_version": "9.9.0"}, "9.9.0, which is later than"),
        (whole | {"more": Malice()}, "unsafe content refused"),
        (pickle.dumps(Malice()), "cannot be read|unsafe content refused"),
    ):
        best.write_bytes(content) if isinstance(content, bytes) else torch.save(content, best)
        process = trainees.train(directory, *MLP, f"init_from={first.run_id}")
        assert re.search(said, refused(process)), process.stderr
        assert process.stdout == ""
    shutil.copy(kept, best)
    wide = [word.replace("hidden=[16]", "hidden=[17]") for word in MLP]
    process = trainees.train(directory, *wide, f"init_from={first.run_id}")
    assert "do not fit this model: " in refused(process) and "size mismatch" in process.stderr
    for address in ("http://127.0.0.1/best.ckpt", "https://example.org/best.ckpt"):
        assert "init_from=http" in refused(trainees.train(directory, *MLP, f"init_from={address}"))
    assert len(TrialResult(directory).runs) == 1
