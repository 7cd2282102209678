"""What a run says of its origin is true, and is said with and without git."""

import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tracklight.tracking import provenance
from tracklight.tracking.provenance import (
    OWN_CODE,
    Git,
    code_digest,
    collect,
    git_state,
    installed_packages,
    own_code,
)


@pytest.fixture
def repository(tmp_path: Path, git) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_clean_work_tree_is_named_by_its_commit_and_branch(repository, git):
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == Git(commit, "trunk", dirty=False)


def test_change_is_kept_as_a_patch_that_git_applies(repository, git):
    (repository / "a.py").write_text("x = 2\n")
    state = git_state(repository)
    assert state.dirty
    git(repository, "checkout", "-q", "a.py")
    patch = repository / "diff.patch"
    patch.write_text(state.diff)
    git(repository, "apply", "diff.patch")
    assert (repository / "a.py").read_text() == "x = 2\n"


def test_untracked_files_are_listed_and_their_content_is_not_kept(repository):
    (repository / "new file.txt").write_text("password")
    state = git_state(repository)
    assert (state.dirty, state.diff, state.untracked) == (False, "", ("new file.txt",))


def test_diff_is_bounded(repository):
    (repository / "a.py").write_text("x = 1  # long\n" * 200_000)
    diff = git_state(repository).diff
    assert len(diff) < 1_000_100
    assert "bytes in all" in diff


def test_repository_of_another_user_is_read_where_his_code_runs_too(repository, git, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    if os.geteuid() != 0:
        pytest.skip("needs the right to give files away (root)")
    monkeypatch.delenv("SUDO_UID", raising=False)  # whom git believes, too
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 4242, 4242)
    with pytest.raises(subprocess.CalledProcessError, match="128"):
        git(repository, "status")
    assert git_state(repository) == Git(commit, "trunk", dirty=False)
    (repository / "a.py").write_text("x = 2\n")
    assert "+x = 2" in git_state(repository).diff
    project = repository / "project"  # ours, in the repository of another user
    project.mkdir()
    lost = r"^the code's commit is not recorded \(git: detected dubious ownership in"
    with pytest.warns(UserWarning, match=lost):
        assert git_state(project) == Git()


@pytest.fixture
def slow_git(repository, monkeypatch, tmp_path_factory):
    """Let one of git's commands take longer than it is waited for."""
    real, folder = shutil.which("git"), tmp_path_factory.mktemp("bin")
    monkeypatch.setattr(provenance, "_GIT_TIMEOUT_S", 0.5)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def slow(command: str) -> None:
        script = f'case " $* " in *" {command} "*) exec sleep 20;; esac; exec {real} "$@"'
        (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "git").chmod(0o755)

    return slow


def test_git_that_is_slow_costs_no_more_than_what_is_said(repository, git, slow_git):
    (repository / "a.py").write_text("x = 2\n")
    commit = git(repository, "rev-parse", "HEAD")
    for command in ("status", "diff"):
        slow_git(command)
        lost = r"^how the code differs from its commit is not recorded \(git: no answer in \d+ s\)$"
        with pytest.warns(UserWarning, match=lost):
            assert git_state(repository) == Git(commit)


def test_repository_without_git_is_said(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"^the code's commit is not recorded \(git: not installed\)$"):
        assert git_state(tmp_path / "project") == Git()


def test_git_is_asked_of_the_project_not_of_the_tree_a_hook_runs_in(repository, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(repository / "elsewhere"))
    assert git_state(repository).commit


@pytest.mark.parametrize("state", ["no commit", "no repository", "no git", "no folder"])
def test_provenance_is_told_without_a_commit(tmp_path, monkeypatch, request, state):
    folder = tmp_path
    if state == "no commit":
        request.getfixturevalue("git")(tmp_path, "init", "-q")
    elif state == "no git":
        monkeypatch.setenv("PATH", "")
    elif state == "no folder":
        folder = tmp_path / "missing"
    found = collect(folder, "train.py", (), {"python": "3"})
    assert not any(key.startswith("mlflow.source.git.commit") for key in found.tags)
    assert found.texts["provenance/packages.txt"]


def test_tags_use_the_names_that_mlflow_shows(monkeypatch):
    git_facts = Git("c0ffee", "trunk", dirty=True, diff="-a\n+b\n", untracked=("n",))
    monkeypatch.setattr(provenance, "git_state", lambda root: git_facts)
    monkeypatch.setattr(provenance, "installed_packages", lambda: {"b": "2", "a": "1"})
    found = collect(Path(), "train.py x=1", (), {"python": "3.12.1"})
    tags = dict(found.tags)
    tags.pop("mlflow.user", None)
    assert tags == {
        "mlflow.source.name": "train.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.source.git.branch": "trunk",
        "mlflow.source.git.dirty": "true",
        "tracklight.command": "train.py x=1",
        "tracklight.code": code_digest(),
        "tracklight.python": "3.12.1",
    }
    texts = found.texts
    assert texts["provenance/packages.txt"] == "a==1\nb==2\n"
    assert re.search(r"^[0-9a-f]{12}  tracklight/models/mlp\.py$", texts["provenance/code.txt"], re.M)
    assert texts["provenance/diff.patch"] == "-a\n+b\n"
    assert texts["provenance/untracked.txt"] == "n\n"


def test_no_tag_exceeds_what_mlflow_takes(tmp_path):
    found = collect(tmp_path, "train.py " + "x" * 20_000, (), {"python": "3"})
    assert max(map(len, found.tags.values())) <= 8000


def test_packages_are_those_installed():
    packages = installed_packages()
    for name in ("torch", "pytorch-lightning", "mlflow", "hydra-core"):
        assert packages[name] == version(name)


@pytest.fixture
def digest_of(monkeypatch):
    """Digest folders as if they were our own code, as a new process would."""

    def digest(folder: Path) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(provenance, "OWN_CODE", (folder,))
            own_code.cache_clear()
            digest = code_digest()
        own_code.cache_clear()
        return digest

    return digest


def test_code_digest_follows_content_and_names_and_nothing_else(tmp_path, digest_of):
    for copy in ("one", "two"):
        folder = tmp_path / copy / "pkg"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a.py").write_text("x = 1\n")
        (folder / "b.py").write_text("y = 1\n")
    one, two = tmp_path / "one" / "pkg", tmp_path / "two" / "pkg"
    first = digest_of(one)
    assert first == digest_of(two)
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"1")
    (two / ".b.py.swp").write_text("editor")
    assert first == digest_of(two)
    (two / "b.py").rename(two / "c.py")
    assert first != digest_of(two)
    (one / "b.py").write_text("y = 2\n")
    assert first != digest_of(one)


def test_code_digest_covers_the_file_of_a_foreign_target(tmp_path, monkeypatch):
    package = tmp_path / "foreign_net"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest(["foreign_net.net.Net"])
    assert before != code_digest()
    (package / "net.py").write_text("class Net: depth = 2\n")
    assert code_digest(["foreign_net.net.Net"]) != before


IMPORTS = {
    "absolute": ("import foreign_net.layers", "foreign_net/layers.py"),
    "from": ("from foreign_net import layers as under", "foreign_net/layers.py"),
    "of a name": ("from foreign_net.layers import Layer", "foreign_net/layers.py"),
    "relative": ("from .layers import Layer", "foreign_net/layers.py"),
    "relative module": ("from . import layers", "foreign_net/layers.py"),
    "in a function": ("def build():\n    from .sub.deep import Deep", "foreign_net/sub/deep.py"),
    "from above": ("from .sub import deep", "beside.py"),
    "of the package": ("", "foreign_net/__init__.py"),
    "without __init__": ("import spaces.bare", "spaces/bare.py"),
    "in a circle": ("from .sub import circle", "foreign_net/sub/circle.py"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_code_digest_covers_what_a_foreign_target_imports_and_imports_nothing(tmp_path, monkeypatch, name):
    line, changed = IMPORTS[name]
    files = {
        "foreign_net/__init__.py": "raise SystemExit('imported')\n",
        "foreign_net/net.py": f"import torch\n{line}\nclass Net: pass\n",
        "foreign_net/layers.py": "class Layer: pass\n",
        "foreign_net/sub/__init__.py": "",
        "foreign_net/sub/deep.py": "from ...beyond import nothing\nimport beside\n",
        "foreign_net/sub/circle.py": "from ..net import Net\n",
        "beside.py": "def broken(:\n",
        "spaces/bare.py": "x = 1\n",
        "unused.py": "x = 1\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest(["foreign_net.net.Net"])
    (tmp_path / "unused.py").write_text("x = 2\n")
    assert code_digest(["foreign_net.net.Net"]) == before
    (tmp_path / changed).write_text(files[changed] + "# changed\n")
    assert code_digest(["foreign_net.net.Net"]) != before


@pytest.mark.parametrize(
    "name", ["torch.optim.SGD", "json.JSONDecoder", "tracklight.errors.BadInput", "nowhere.Net"]
)
def test_installed_and_own_and_unknown_targets_add_nothing_to_the_code_digest(name):
    assert code_digest([name]) == code_digest()


def test_own_code_is_the_two_packages():
    assert [folder.name for folder in OWN_CODE] == ["tracklight", "tracklight"]
    assert (OWN_CODE[0] / "errors.py").is_file()


def test_provenance_asks_git_twice_and_opens_no_metadata_of_packages(repository, monkeypatch):
    (repository / "a.py").write_text("x = 2\n")
    asked, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: asked.append(a) or run(*a, **k))
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: pytest.fail("reads all"))
    collect(repository, "train.py", (), {"python": "3"})
    assert len(asked) == 2


def test_our_own_code_counts_as_it_was_when_the_process_first_asked(monkeypatch, tmp_path):
    before = code_digest()
    (tmp_path / "edited.py").write_text("meanwhile")
    monkeypatch.setattr(provenance, "OWN_CODE", (tmp_path,))
    assert code_digest() == before
    own_code.cache_clear()
    assert code_digest() != before
    own_code.cache_clear()
