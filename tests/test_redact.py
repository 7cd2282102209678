"""No secret leaves: not from structure, not from text, not from the environment."""

import io
import logging
import shlex
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracklight.config.overrides import parse_overrides, redact_command
from tracklight.redact import is_secret, redact, redact_messages
from tracklight.tracking.provenance import git_state


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://me:p@ss/w:rd@host/db", "postgresql://***@host/db"),
        ("https://t0ken@host", "https://***@host"),
        ("http://host/?user=me&password=hunter2&x=1", "http://host/?user=me&password=***&x=1"),
        ("http://host/?pwd=hunter2&key=k3y&monkey=1", "http://host/?pwd=***&key=***&monkey=1"),
        ("an interval stands alone, as in KEY=interval(1,2)",) * 2,
        ("cannot reach http://a:b@c: timed out", "cannot reach http://***@c: timed out"),
        ("sqlite:////tmp/a b/mlflow.db", "sqlite:////tmp/a b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_no_secret_of_a_uri_is_shown(text, safe):
    assert redact(text) == safe


SECRETS = st.from_regex(r"[A-Za-z][A-Za-z0-9]{3}Zq[A-Za-z0-9]{6,20}", fullmatch=True)
KEYS = (
    *("password", "sslpassword", "db_password", "PGPASSWORD", "passphrase", "pwd", "pw", "secret"),
    *("api_key", "apiKey", "API-KEY", "access_token", "client_secret", "AWS_SECRET_ACCESS_KEY"),
    *("auth", "authorization", "cookie", "sas", "access_key", "account_key", "private_key"),
    *("aws_access_key_id", "token", "hf_token", "credentials", "storage.password"),
    *("auth.value", "credentials.value", "password.x.y", "api.key", "pass", "db_pass", "userpass", "creds"),
    *("accesstoken", "clientsecret", "secretkey", "privatekey", "hftoken", "SharedAccessSignature"),
    *("storage_key", "wandb_key", "master_key", "callbacks.u.pass"),
)
FORMS = (
    *("{key}={value}", "{key}: {value}", '"{key}": "{value}"', "'{key}': '{value}, and more'"),
    *("--{key} {value}", "--{key}={value}", "x --{key} '{value} b' y", '{key} = "{value} \\" b"'),
    *("+data.db={{{key}: {value}}}", "{{a: 1, {key}: '{value}', b: 2}}", "{key}=[{value},b]"),
    *("{key} => '{value}'", "{key} := {value}", '{{\\"{key}\\": \\"{value}\\"}}', "{key}=a,{value}"),
    *("a: 1\n{key}: |\n  x\n  {value}\nb: 2", "\n{key}:\n- a\n- {value}", "\n{key}: my long {value}\nb: 1"),
    *("{{'a': '***', '{key}': {{'b': [{{'c': '{value}'}}]}}}}", "{key}: [a, [b, {value}]]"),
    *("os.environ['{key}'] = '{value}'", '+c["db"]["{key}"]="{value}"', "- name: {key}\n+  value: {value}"),
    *("{{{key}: my long {value}}}", "{{'name': '{key}', 'value': '{value}'}}", "['--{key}', '{value}']"),
    *("{{{key}: {{a: '{value}", "name={key}, value={value}"),
    *("https://host/p?a=1&{key}={value}&b=2", "+    {key} = '{value}'", "{key}={{a: {value}, b: 1}}"),
)
SHAPES = (
    *("Authorization: Bearer {value}", "authorization: Basic {value}==", "user:{value}@host:5432/db"),
    *("postgresql://me:{value}@host/db", "https://{value}@host", "https://x.net/?sig={value}&se=1"),
    *("user:pa/{value}@host", "postgresql://me:p {value}@host/db", "Cookie: a=1; b={value}"),
    "Authorization: AWS4-HMAC-SHA256 Credential=x, Signature={value}",
    *("https://x?X-Amz-Signature={value}", "https://x?X-Amz-Credential={value}", "https://x?key={value}"),
)


@given(SECRETS, st.sampled_from(KEYS), st.sampled_from(FORMS), st.text(max_size=10))
def test_a_secret_under_a_telling_name_is_starred_out_however_it_is_written(value, key, form, text):
    assert value not in redact(f"{text} {form.format(key=key, value=value)}")


@given(SECRETS, st.sampled_from(SHAPES))
def test_a_secret_of_a_telling_shape_is_starred_out(value, shape):
    assert value not in redact(f"failed: {shape.format(value=value)}")


@pytest.mark.parametrize(
    "value",
    [
        *("AKIA" + "Z" * 16, "ghp_" + "a" * 36, "glpat-" + "a" * 20, "hf_" + "a" * 34),
        *("sk_live_" + "a" * 24, "SG." + "a" * 22 + "." + "b" * 43, "ya29." + "a" * 30, "pypi-" + "A" * 40),
        *("https://hooks.slack.com/services/T0/B0/x", "https://discord.com/api/webhooks/1/x"),
        *("sk-" + "a" * 24, "xoxb-" + "1" * 12, "AIza" + "b" * 35),
        "eyJhbGciOiJI." + "eyJzdWIiOiIx" + ".c2ln",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_key_of_a_well_known_service_is_starred_out_wherever_it_stands(value):
    assert redact(f"in {value} out") == "in *** out"


@given(SECRETS, st.sampled_from(KEYS))
def test_what_lies_below_a_telling_key_is_starred_out_whole(value, key):
    tree = {"a": [{key: value}, {key: {"b": [value]}}], key: value}
    assert redact(tree) == {"a": [{key: "***"}, {key: "***"}], key: "***"}


@settings(deadline=None)
@given(SECRETS, st.sampled_from(KEYS))
def test_no_word_of_a_command_shows_a_secret(value, key):
    words = ["train.py", f"+{key}={value} with, comma", f"--{key}", f"{value} x", "-m", "seed=1,2"]
    command = redact_command([*words, f"+data.db={{{key}: {value}}}"])
    assert value not in command
    assert command.startswith("train.py ") and "-m seed=1,2" in command


@pytest.mark.parametrize(
    "text",
    [
        *("max_tokens=5", "keyboard=de", "monkey=1", "key=value", "tokenizer=bert", "author=me"),
        *("optimizer.lr=0.1", "token=5", "num_tokens: 7", "bypass=3", "compass: 1", "secretary=1"),
        *("trial 1: lr=0.1", "2026-11-25 20:10:00", "C:/x", "error: data.root=x: cannot"),
        *(
            "passes: 3",
            "low_pass=0.3",
            "num_tokens=7",
            "tokens=[1,2]",
            "data.keys=[a]",
        ),
        *("pad_token=<pad>", "data.eos_token: </s>", "mask_token_id=x", "a['keys'] = 'b'"),
        "experiment=seed_mlp sets trainer.max_epochs, which this config does not have",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "key",
    [
        "max_tokens",
        "bypass",
        "compass",
        "passes",
        "keyboard",
        "monkey",
        "author",
        "tokenizer",
        "key",
        "eos_token",
    ],
)
def test_a_key_that_only_looks_telling_names_no_secret(key):
    assert not is_secret(key, "value")


def test_keys_that_name_secrets_are_starred_out_at_any_depth():
    tree = {
        "a": [{"db_password": 1234, "API_KEY": "k"}],
        "token": "t",
        "max_tokens": 8,
        "secret": None,
    }
    safe = {
        "a": [{"db_password": "***", "API_KEY": "***"}],
        "token": "***",
        "max_tokens": 8,
        "secret": None,
    }
    assert redact(tree) == safe


def test_what_a_variable_of_a_telling_name_holds_is_starred_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl4nt3d")
    monkeypatch.setenv("PGPASSWORD", "short")  # five characters are part of other words
    monkeypatch.setenv("MNIST_ROOT", "/data/mnist")
    tree = {"data": {"path": "s3://pl4nt3d/x", "root": "/data/mnist"}, "a": ["shorter", "pl4nt3d"]}
    safe = {"data": {"path": "s3://***/x", "root": "/data/mnist"}, "a": ["shorter", "***"]}
    assert redact(tree) == safe


def test_the_patch_of_a_work_tree_shows_no_secret(tmp_path, git):
    (tmp_path / "a.py").write_text("x = 1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(tmp_path, *words)
    (tmp_path / "a.py").write_text("API_KEY = 'pl4nt3d s'\nurl = 'http://me:pl4nt3d@host'\n")
    diff = git_state(tmp_path).diff
    assert "+API_KEY = '***'" in diff
    assert "pl4nt3d" not in diff


@given(SECRETS, st.sampled_from(KEYS))
def test_a_telling_pair_as_data_hides_its_value_and_a_key_of_a_mapping_may_be_a_secret(value, key):
    tree = [{"name": key, "value": value}, [f"--{key}", value], {f"https://me:{value}@host": None}]
    assert redact(tree) == [{"name": key, "value": "***"}, [f"--{key}", "***"], {"https://***@host": None}]
    assert value not in redact(str(tree))


@settings(deadline=None)
@given(SECRETS, st.sampled_from(KEYS))
def test_the_overrides_of_a_command_are_redacted_as_the_trees_that_they_are(value, key):
    nested = f"+callbacks.u={{a: 1, b: {{{key}: {{user: {{deep: {value}}}}}}}, c: 'x y'}}"
    words = [
        "train.py",
        nested,
        f"+u.list=[a,{{{key}: my long {value}}}]",
        f"-p{value}",
        f"--{key}",
        f"-{value}",
    ]
    command = redact_command(words)
    assert value not in command
    assert len(shlex.split(command)) == len(words)
    assert parse_overrides([shlex.split(command)[1]])[0].value() == {"a": 1, "b": {key: "***"}, "c": "x y"}


def test_a_text_of_any_shape_is_redacted_in_time_that_grows_with_its_length():
    shapes = (
        "x",
        "-",
        "a-",
        "a_",
        "u:p",
        "{",
        "password: {",
        "://u:p ",
        "://a",
        "password:\n",
        "password: '",
    )
    for text in shapes:
        start_s = time.process_time()
        redact(text * (100_000 // len(text)))
        assert time.process_time() - start_s < 5, text  # 1 at most; a quadratic one takes 10 and more


def test_a_secret_of_a_url_may_be_long_and_hold_spaces():
    for secret in ("x" * 1900, "x y" * 600):
        assert redact(f"at http://me:{secret}@host/") == "at http://***@host/"


def test_what_libraries_log_and_warn_of_is_redacted(capsys):
    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("of.a.library")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        redact_messages()
        logger.error("login with %s, password=%s", {"db": {"auth": {"a": "pl4nt3d"}}}, "pl4nt3d")
        try:
            raise RuntimeError("password=pl4nt3d")
        except RuntimeError:
            logger.exception("no login")
        said = warnings.formatwarning("login with password=pl4nt3d", UserWarning, "a.py", 1)
        logger.error("%d", "no number")  # logging itself says so
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_warning
    assert "pl4nt3d" not in stream.getvalue() + said
    assert "login with {'db': {'auth': ***}}, password=***" in stream.getvalue()
    assert "RuntimeError: password=***" in stream.getvalue()
    assert said == "warning: login with password=*** (UserWarning at a.py:1)\n"
    assert "Logging error" in capsys.readouterr().err


def test_where_one_stands_and_where_a_secret_lies_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("OLDPWD", "/was/here")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path))
    text = f"data.path={tmp_path}/rows.csv /was/here/too"
    assert redact({"text": text}) == {"text": text}
    monkeypatch.setenv("DB_PASSWORD", "/hunter2/")
    assert redact("is /hunter2/ it") == "is *** it"
