"""What README and the pages of docs/ say to type works, in a fresh copy of the project, page by page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from doc_pages import HEADS, PAGES, Block, anchors, blocks, commands, links
from tracklight.cli import compose_run
from tracklight.commands import parser
from tracklight.config.overrides import check_overrides, flags_parser, parse_flags
from tracklight.errors import BadInput
from tracklight.paths import CONF, PACKAGE, ROOT

LANGUAGES = {"bash", "python", "yaml", "toml", "text", "{toctree}", "{eval-rst}"}
ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "bash"]
NOT_RUN = [block for block in ALL if block.not_run]
RUNS = [
    page for page in PAGES if any(b.language in ("bash", "python") and not b.not_run for b in blocks(page))
]
TARGETS = set(re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split())  # pyright: ignore
TEMPLATE = PACKAGE / "commands" / "template"  # of a project
LIMIT_S = 1200  # of a page


@pytest.mark.parametrize("block", ALL, ids=str)
def test_each_block_names_its_language_and_is_written_in_it(block):
    assert block.language in LANGUAGES
    if block.part_of:
        assert re.sub(r"\s+", " ", block.text) in re.sub(r"\s+", " ", (ROOT / block.part_of).read_text())
    match block.language:
        case "python":
            compile(textwrap.dedent(block.text), str(block), "exec")
        case "yaml":
            yaml.safe_load(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "bash":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def words_of_training(command: list[str]) -> list[str] | None:
    """Return the words that a command gives to train.py, None for any other command."""
    if "train.py" in command:
        return command[command.index("train.py") + 1 :]
    return command[2:] if command[:2] == ["tracklight", "train"] else None


def in_presets() -> list[Block]:
    """Return the commands at the heads of the files in conf/ as blocks."""
    found = []
    for path in HEADS:
        command = re.search(r"^# (python .*)$", path.read_text(), re.M)
        found.append(Block(str(path.relative_to(CONF)), 1, "bash", command[1] if command else ""))
    return found


@pytest.mark.parametrize("block", [*SHELL, *in_presets()], ids=str)
def test_each_command_is_one_that_exists_with_arguments_that_it_takes(block, tmp_path, monkeypatch):
    written = {b.file: b.text for b in ALL if b.page == block.page and b.file}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in commands(block.text) if block.exits == "0" else ():
        program = Path(command[0]).name
        if (words := words_of_training(command)) is not None:
            check_training(words, tmp_path)
        elif program == "make":
            assert command[1] in TARGETS, block
        elif program == "tracklight" or command[1:2] and command[1].startswith("scripts/"):
            name = Path(command[1]).stem
            if name not in ("--help", "schema", "bench", "recording"):
                check_arguments(name, command[2:], monkeypatch)


def check_training(words: list[str], further: Path) -> None:
    """Compose what the words describe; of several values of a key the first, or where an interval begins."""
    args = parse_flags(flags_parser(), [word for word in words if word != "--json"])
    overrides = check_overrides(args.overrides, multirun=args.multirun)
    own = {path.stem for folder in (further, TEMPLATE) for path in folder.rglob("conf/*/*.yaml")}
    plain = []
    for each in OverridesParser.create().parse_overrides(overrides):
        if not each.is_sweep_override():
            value = each.get_value_element_as_str()
        elif each.is_choice_sweep() or each.is_range_sweep():
            value = next(each.sweep_string_iterator())
        else:
            value = each.value().start
        if each.key_or_group.startswith("hydra") or value in own:
            continue  # launchers; files that the page itself writes
        if not (own and each.key_or_group.startswith("model.")):
            plain.append(f"{each.input_line[: each.input_line.index('=')]}={value}")
    words = [word.replace("RUN_ID", "0123abcd").replace("=gpu", "=cpu") for word in plain]
    compose_run(words)


def check_arguments(name: str, words: list[str], monkeypatch) -> None:
    """Parse a command's arguments by its own parser, without running it."""
    assert name in parser.COMMANDS
    monkeypatch.setattr(parser, "importlib", SimpleNamespace(import_module=lambda module: NotRun()))
    monkeypatch.setattr(parser, "choose_temporary_folder", lambda folder: None)
    if "--help" not in words:
        assert parser.main(name, words) == 0


class NotRun:
    """Stands for a command's module."""

    def run(self, args) -> int:
        """Do nothing."""
        return 0


def test_an_argument_that_no_command_takes_would_be_found(monkeypatch):
    with pytest.raises(BadInput):
        check_arguments("compare", ["--colums", "lr"], monkeypatch)
    with pytest.raises(BadInput):
        check_training(["optimizer.lrr=1"], Path("/nowhere"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link in links(page):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("room", ["models", "data"])
def test_the_reference_has_each_module_of_the_rooms_that_users_extend(room):
    listed = re.findall(rf"automodule:: tracklight\.{room}\.(\w+)", (ROOT / "docs" / "api.md").read_text())
    there = [path.stem for path in (PACKAGE / room).glob("[!_]*.py")]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("folder", [path for path in CONF.iterdir() if path.is_dir()], ids=lambda p: p.name)
def test_each_config_group_has_a_page_in_the_contents(folder):
    contents = (ROOT / "docs" / "index.md").read_text()
    assert folder.name == "hydra" or f"\ngenerated/config-{folder.name}\n" in contents


@contextmanager
def python_process(folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """An interpreter that executes blocks in one namespace and answers with what each prints."""
    script = (
        "import contextlib, io, json, sys\n"
        "names, answers = {'__name__': '__main__'}, sys.stdout\n"
        "for line in sys.stdin:\n"
        "    printed = io.StringIO()\n"
        "    with contextlib.redirect_stdout(printed):\n"
        "        exec(compile(json.loads(line), 'page', 'exec'), names)\n"
        "    print(json.dumps(printed.getvalue()), file=answers, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project as a clone has it, with an environment that is installed."""
    folder = tmp_path / "tracklight"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".installed":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / ".installed").touch()
    return folder


@pytest.fixture
def env(copy: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which the copy is what is imported, and nothing is downloaded."""
    ours = ("MLFLOW_", "MNIST_ROOT", "MAKE", "MFLAGS", "ARGS")  # those of make, which may run the tests
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    nowhere = {f"{each}_proxy": "http://127.0.0.1:9" for each in ("http", "https")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | nowhere | {"PYTHONPATH": str(copy / "src"), "PATH": path, "STATE": str(tmp_path / "state")}


def newest_run(folder: Path) -> str:
    """Return the id of the newest run of the copy that is no sweep."""
    found = sorted(folder.glob("mlruns/artifacts/*/artifacts/checkpoints"), key=lambda p: p.stat().st_mtime)
    return found[-1].parents[1].name


def run_shell(block: Block, folder: Path, env: dict[str, str]) -> str:
    """Run a block in bash, which finds folder and variables as the block before left them."""
    text = block.text.replace("RUN_ID", newest_run(folder)) if "RUN_ID" in block.text else block.text
    text = text.rstrip() + (f" || [ $? -eq {block.exits} ]" if block.exits != "0" else "")
    before = '[ -f "$STATE" ] && . "$STATE" || true\nset -aeo pipefail\n'
    after = '\n{ export -p; echo "cd $(printf %q "$PWD")"; } > "$STATE"\n'
    ended = subprocess.run(
        ["bash", "-c", f"{before}{text}{after}"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, f"{block}: {text}\n{ended.stdout}\n{ended.stderr}"
    assert block.exits == "0" or "error: " in ended.stderr, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNS, ids=lambda page: page.name)
def test_what_a_page_says_to_type_works_and_prints_what_it_shows(page, copy, env):
    checker, flags = OutputChecker(), ELLIPSIS | NORMALIZE_WHITESPACE
    with python_process(copy, env) as python:
        for block in blocks(page):
            printed = ""
            if block.file:
                (copy / block.file).write_text(block.text)
            elif block.not_run or block.part_of:
                continue
            elif block.language == "bash":
                printed = run_shell(block, copy, env)
            elif block.language == "python":
                print(json.dumps(block.text), file=python.stdin, flush=True)
                answer = python.stdout.readline()
                assert answer, f"{block} failed"
                printed = json.loads(answer)
            if block.output is not None:
                assert checker.check_output(block.output, printed, flags), f"{block} printed\n{printed}"


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_what_cannot_be_run_is_listed_with_its_reason(block):
    pytest.skip(f"{block} {shlex.quote(block.text.splitlines()[0])}: {block.not_run}")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if not all(map(find_spec, ("furo", "myst_parser", "sphinx"))):
        pytest.skip("needs the extra docs: pip install -e '.[docs]'")
    words = ["--quiet", "--fail-on-warning", str(ROOT / "docs"), str(tmp_path)]
    ended = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "generated" / "config-model.html").exists()
