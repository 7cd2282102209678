"""The process: exit codes, one line, nothing heavy, nothing written."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest

from tracklight import cli
from tracklight.errors import BadInput, RunFailed
from tracklight.paths import PACKAGE, ROOT

TRAIN = ROOT / "train.py"
ENTER = f"import runpy; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
HEAVY = {"torch", "pytorch_lightning", "mlflow", "optuna", "numpy", "pandas", "sqlalchemy"}


def train(*words, cwd=None, **env):
    command = [sys.executable, str(TRAIN), *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def call(monkeypatch):
    """Run `cli.main` in this process, as `python train.py WORDS` would, with another task."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(task, *words):
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *words])
        return cli.main(task)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error):
    def task(cfg):
        raise error

    return task


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lrr=1"],
        ["model=mpl"],
        ["seed=1", "seed=2"],
        ["seed=1,2"],
        ["optimizer.lr=nan"],
        ["model._target_=os.system"],
        ["--nonsense"],
        ["--optimizer.lr=1"],
        ["-m", "optimizer.lrr=1,2"],
        ["--experimental-rerun", "x.pickle"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(programs, words, tmp_path):
    before = sorted((ROOT / "mlruns").iterdir())
    ended = programs.run(tmp_path, ENTER, *words)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
    assert sorted((ROOT / "mlruns").iterdir()) == before


@pytest.mark.parametrize(
    "word",
    ["optimizer.lrr=1", "optimizer.lr=abc", "model._target_=os.system", "trainer.strategy=foo", "+seed=1"]
    + ["trainer.plugins=foo", "trainer.profiler=foo", "overrides=[x]", 'tracking.note="\x1b[31m"']
    + [f"tracking.dir=/tmp/{'d' * 200}/{'e' * 200}/{'f' * 170}"],
)
def test_bad_input_is_told_before_anything_heavy_is_imported(programs, tmp_path, word):
    code = f"""if True:
        import sys
        try:
            {ENTER}
        except SystemExit as end:
            assert end.code == 2
        print(*sorted({HEAVY!r} & set(sys.modules)))
    """
    ended = programs.run(tmp_path, code, word)
    assert (ended.returncode, ended.stdout.split()) == (0, []), ended.stderr


def test_a_file_of_another_folder_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latin.yaml").write_bytes(b"_target_: x # \xe9\n")
    ended = train(f"--config-dir={tmp_path}", "model=latin")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert f"{tmp_path}/model/latin.yaml is not UTF-8" in ended.stderr


def test_bad_input_is_told_within_a_second_of_computing():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    train("optimizer.lrr=1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_without_its_environment_train_py_says_how_to_activate_it(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-S", "-I", TRAIN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "source .venv/bin/activate" in ended.stderr
    assert "make train" in ended.stderr


def test_the_entry_script_only_enters():
    assert len(TRAIN.read_text().splitlines()) < 20


def test_help_explains_the_groups_in_readable_form(programs, tmp_path):
    ended = programs.run(tmp_path, ENTER, "--help")
    assert ended.returncode == 0
    for part in ("model: cnn, linear, mlp", "experiment=mnist_fast", "resume=auto", "optimizer:\n  "):
        assert part in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("experiment:")]
    assert max(map(len, lines)) <= 120  # the list of presets is as long as there are presets
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_search_prints_what_would_run_and_nothing_else(programs, tmp_path):
    ended = programs.run(tmp_path, ENTER, "-m", "optimizer.lr=interval(0.01,0.1)", "sweep.dry_run=true")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[:2] == [
        "20 trials by tpe, of",
        "  optimizer.lr = interval(0.01,0.1)",
    ]


def test_passwords_are_not_shown_by_the_flags_that_show_the_config(programs, tmp_path):
    words = ("--cfg", "job", "--resolve")
    ended = programs.run(tmp_path, ENTER, *words, MLFLOW_TRACKING_URI="http://me:hunter2@host")
    assert "uri: http://***@host" in ended.stdout
    assert "hunter2" not in ended.stdout + ended.stderr


def test_passwords_are_not_shown_in_errors(call, capsys):
    with pytest.raises(SystemExit):
        call(raising(BadInput("tracking.uri=ftp://me:hunter2@host\nis no server")))
    assert capsys.readouterr().err == "error: tracking.uri=ftp://***@host is no server\n"
    with pytest.raises(SystemExit):
        call(raising(ZeroDivisionError("ftp://me:hunter2@host")))
    assert "hunter2" not in capsys.readouterr().err


def test_control_characters_are_printed_escaped_but_for_those_of_progress_bars(call, capsys):
    bar = "\r\x1b[2K\x1b[1A\x1b[?25l\x1b[1;32mgreen\x1b[0m ü\n\t"
    orders = {
        "\x1b]0;title\x07": r"\x1b]0;title\x07",
        "\x1b[6n": r"\x1b[6n",
        "\x9b2J": r"\x9b2J",
        "\x1bc": r"\x1bc",
    }
    call(lambda _: print(bar, *orders))
    assert capsys.readouterr().out == " ".join([bar, *orders.values()]) + "\n"
    with pytest.raises(SystemExit):
        call(raising(BadInput("run a\x1b[31mred\r is none")))
    assert capsys.readouterr().err == "error: run a\\x1b[31mred is none\n"


def test_the_score_is_returned(call):
    assert call(lambda cfg: cfg.optimizer.lr, "optimizer.lr=0.25") == 0.25


def test_a_failed_run_is_one_line_and_exit_code_1(call, capsys):
    with pytest.raises(SystemExit) as end:
        call(raising(RunFailed("loss is nan")))
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: loss is nan\n"


def test_a_bug_keeps_its_traceback_and_is_exit_code_1(call, capsys):
    with pytest.raises(SystemExit) as end:
        call(raising(KeyError("bug")))
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "KeyError: 'bug'" in printed


def test_signals_have_their_exit_codes(call):
    from tracklight.engine.signals import Stopped

    for error, code in ((KeyboardInterrupt(), 130), (Stopped(15), 143), (Stopped(2), 130)):
        with pytest.raises(SystemExit) as end:
            call(raising(error))
        assert end.value.code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_with_its_exit_code(number, code):
    program = """
        import signal, time
        from tracklight.cli import main
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        def task(cfg):
            print("ready", flush=True)
            time.sleep(30)
        main(task)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr.read() == b""


def test_a_stored_run_is_resumed_with_the_overrides_for_its_own_config(call):
    cfg = call(lambda cfg: cfg, "resume=1234e567", "model.hidden=[9]", "trainer.max_epochs=7")
    assert cfg.resume == "1234e567"
    assert cfg.overrides == ["model.hidden=[9]", "trainer.max_epochs=7"]


def test_a_config_folder_of_ones_own_is_searched_too(call, tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.125\n")
    assert call(lambda cfg: cfg.optimizer.lr, "--config-dir", str(tmp_path), "optimizer=mine") == 0.125


def test_bad_input_under_a_flag_is_bad_input_too(call, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call(raising(AssertionError), "--config-dir", str(tmp_path), "optimizer.lr=-1")
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_usage_reporting_and_advertising_are_off(monkeypatch):
    import logging

    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    cli.quiet()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    tip = logging.LogRecord("x", logging.INFO, "", 0, "💡 Tip: For seamless cloud uploads", None, None)
    news = logging.LogRecord("x", logging.INFO, "", 0, "GPU available: False", None, None)
    assert not log.filter(tip)
    assert log.filter(news)


@pytest.mark.skipif(sys.platform != "linux", reason="needs libgomp, of PyTorch for Linux")
@pytest.mark.parametrize(
    ("load", "given", "policy", "spins"),
    [
        (1.0, {}, "", "300000"),  # libgomp's own
        (2.0, {}, "PASSIVE", "0"),
        (2.0, {"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000"),
        (2.0, {"GOMP_SPINCOUNT": "77"}, "", "77"),
    ],
)
def test_threads_of_a_crowded_machine_sleep_while_they_wait_unless_the_user_says_otherwise(
    load, given, policy, spins
):
    code = f"import os; os.getloadavg = lambda: ({load} * os.cpu_count(), 0.0, 0.0)\n"
    code += "from tracklight import cli; cli.quiet(); import torch"
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | given | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert not policy or f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert not done.stdout


def test_a_container_need_not_tell_its_load(monkeypatch):
    def unknown() -> None:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", unknown)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli.quiet()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_the_library_still_prints_its_tips_where_they_are_filtered():
    import inspect

    from pytorch_lightning.trainer.connectors.logger_connector import logger_connector
    from pytorch_lightning.utilities import rank_zero

    assert 'rank_zero_info(\n                "💡 Tip:' in inspect.getsource(logger_connector)
    assert rank_zero.rank_zero_module.log.name == "pytorch_lightning.utilities.rank_zero"


def test_a_warning_is_a_line_and_ours_names_no_place_in_the_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", None)
    cli.quiet()
    place = (UserWarning, f"{PACKAGE}/data/mnist.py", 136)
    assert warnings.formatwarning("no MNIST", *place) == "warning: no MNIST\n"
    place = (FutureWarning, "/somewhere/lib.py", 7)
    said = warnings.formatwarning("is deprecated", *place, "call()")
    assert said == "warning: is deprecated (FutureWarning at /somewhere/lib.py:7)\n"


def test_a_rank_that_is_no_number_is_one_line_before_lightning_reads_it():
    process = train("tracking=none", RANK="abc")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: RANK=abc in the environment is no rank; try `unset RANK`\n"


def test_an_error_of_the_disk_is_one_line(call, capsys):
    with pytest.raises(SystemExit) as end:
        call(raising(OSError(errno.ENOSPC, "No space left on device", "/data/figure.png")))
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: No space left on device: /data/figure.png\n"
