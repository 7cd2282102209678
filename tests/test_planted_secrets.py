"""A secret planted anywhere in a command is nowhere in what is stored or shown."""

import contextlib
import io
import logging
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from process import Trainees, free_port
from tracklight import cli
from tracklight.experiment.train import run

CLIENT = (
    "allowed_targets=[tracklight.models,tracklight.data,torch.optim,foreign]",
    "+callbacks.client._target_=foreign.Client",
    *("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "tracking.figures=false", "num_threads=1"),
    "tracking.uri=null",
)
# Each example is a run; to shrink one would take minutes.
SLOW = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
SECRETS = st.from_regex(r"[A-Z][a-z]{2}Zq[A-Za-z0-9]{8}", fullmatch=True)
TELLING = st.sampled_from(
    ("password", "db_pass", "creds", "apiKey", "hftoken", "auth", "storage_key", "cookie")
)
PLAIN = st.sampled_from(("a", "client", "x1", "monkey", "rows"))
LEAVES = ("{}", "[a, {}]", "[[{}]]", "'{} and, more'", "{{user: me, deep: {{b: [{}]}}}}", "my long {}")


@st.composite
def planted(draw):
    """A secret, the overrides that plant it, and the environment."""
    secret, key = draw(SECRETS), draw(TELLING)
    leaf, top = draw(st.sampled_from(LEAVES)).format(secret), "+callbacks.client"
    path = [*draw(st.lists(PLAIN, max_size=2)), key, *draw(st.lists(PLAIN, max_size=2))]
    braces = leaf
    for name in reversed(path):
        braces = f"{{{name}: {braces}}}"
    form, fails = draw(st.integers(0, 5)), draw(st.booleans())
    words = (
        [f"{top}.{'.'.join(path)}={leaf}"],
        [f"{top}.settings={braces}"],
        [f"{top}.all=[{{name: {key}, value: {secret}}}, [--{key}, {secret}], {braces}]"],
        [f"{top}.url='https://me:{secret}@host/x?sig={secret}'", f"tracking.run_name='run {key}={secret}'"],
        [f"{top}.note=\"{key} => '{secret}', {key}: '{secret}'\""],
        [f"{top}.note={secret}", f"tracking.run_name='of {secret}'", f"+data.name={secret}"],
    )[form]
    if form == 5:
        words.pop()
    return (
        secret,
        [*words, f"{top}.fails={str(fails).lower()}"],
        {"MY_ACCESS_TOKEN": secret} if form == 5 else {},
    )


def enter(words, directory, environment, command=None, ignored=()):
    """Enter a command line in this process; return its exit code and what it printed."""
    printed, log = io.StringIO(), logging.StreamHandler(io.StringIO())
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    logging.getLogger().addHandler(log)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train.py", *words, *ignored])
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        code = 0
        try:
            if command:
                cli.enter(command, words)
            else:
                cli.main(run)
        except SystemExit as ended:
            code = ended.code
    logging.getLogger().removeHandler(log)
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, printed.getvalue() + log.stream.getvalue()


def assert_absent(secret, directory, printed):
    assert secret not in printed
    leaking = [p for p in directory.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
    assert leaking == []
    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert runs and secret not in str([(r.to_dictionary(), r.inputs.to_dictionary()) for r in runs])
    return runs


def check(planting):
    secret, words, environment = planting
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        line = [*CLIENT, *words, f"tracking.dir={directory}"]
        code, printed = enter(line, directory, environment)
        assert code == int("callbacks.client.fails=true" in words[-1]), printed
        assert "calls with" in printed  # the callback did get it
        (stored,) = assert_absent(secret, directory, printed)
        assert "***" in str(stored.to_dictionary())
        typed = shlex.split(stored.data.tags["tracklight.command"])
        assert len(typed) == len(line) + 1 and typed[1:3] == line[:2]


@settings(max_examples=4, derandomize=True, **SLOW)
@given(planted())
def test_a_planted_secret_is_nowhere_in_the_store_the_folder_or_the_output(planting):
    check(planting)


@pytest.mark.slow
@settings(max_examples=80, **SLOW)
@given(planted())
def test_secrets_planted_at_random_are_nowhere(planting):
    check(planting)


def test_evaluate_shows_and_stores_no_secret(tmp_path):
    secret = "".join(["pl4nt", "3dZq", "s3cr3t"])
    words = [*CLIENT[2:], f"tracking.run_name='pwd: {secret}'", f"tracking.dir={tmp_path}"]
    assert enter(words, tmp_path, {})[0] == 0
    (trained,) = assert_absent(secret, tmp_path, "")
    options = [trained.info.run_id, "--dir", str(tmp_path), "--split", "train"]
    refused = enter([*options, f"+data.db={{password: {secret}}}"], tmp_path, {}, "evaluate")
    assert refused[0] == 2 and secret not in refused[1] and "data.db={password: ***}" in refused[1]
    code, printed = enter(options, tmp_path, {}, "evaluate", ["--password", f"-{secret}", f"-p{secret}"])
    assert code == 0, printed
    assert len(assert_absent(secret, tmp_path, printed)) == 2


@pytest.mark.slow
@pytest.mark.server
def test_a_server_is_sent_no_secret(tmp_path, template):
    secret, trainees, port = (
        "".join(["pl4nt", "3dZq", "s3cr3t"]),
        Trainees(template),
        free_port(),
    )
    server = trainees.serve(tmp_path / "server", port)
    try:
        words = [*CLIENT[:-1], f"tracking.uri=http://127.0.0.1:{port}", f"tracking.dir={tmp_path / 'runs'}"]
        words += [
            f"+callbacks.client.settings={{a: {{db_pass: [{secret}]}}}}",
            f"+callbacks.client.password={secret}",
        ]
        words += [f"tracking.note='with token={secret}'", f"+tracking.tags.auth={secret}"]
        code, printed = enter(words, tmp_path, {"MY_ACCESS_TOKEN": secret})
        assert code == 0 and "calls with" in printed, printed
        assert secret not in printed
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {"mlflow.db", "config.yaml", "points.wal"} <= {path.name for path in files}
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    finally:
        server.send(signal.SIGKILL, group=True)
        trainees.close()
