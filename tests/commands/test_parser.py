"""The command lines, parsed before anything heavy is imported."""

import subprocess
import sys

import pytest

from tracklight.commands.parser import COMMANDS, main
from tracklight.errors import BadInput

CALL_ALL = """
import sys
from tracklight.commands.parser import COMMANDS, main
for command in COMMANDS:
    try:
        main(command, sys.argv[1:])
    except (Exception, SystemExit) as error:
        print(type(error).__name__, file=sys.stderr)
heavy = {"torch", "pytorch_lightning", "mlflow", "numpy", "pandas", "sqlalchemy"}
print(*heavy & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(("word", "error"), [("--help", "SystemExit"), ("--no-such", "BadInput")])
def test_help_and_bad_arguments_are_answered_without_heavy_imports(word, error):
    command = [sys.executable, "-c", CALL_ALL, word]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stderr.split() == [error] * len(COMMANDS)


def test_a_missing_package_is_bad_input_with_the_way_to_the_environment(monkeypatch):
    monkeypatch.setitem(sys.modules, "tracklight.commands.ui", None)
    with pytest.raises(BadInput, match="here: `source .venv/bin/activate` or `make train`"):
        main("ui", [])
