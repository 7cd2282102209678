"""Makes a project: a model, data, their config, a preset and a test, ready to train.

The files lie in template/, where `NAME` stands for the package and `dot-` for the dot of a hidden file;
what a tool would take for a part of this repository has `.txt` behind its name.
"""

import importlib.util
import keyword
import shutil
from argparse import Namespace
from pathlib import Path

from tracklight.commands.parser import HELP
from tracklight.errors import BadInput
from tracklight.paths import PACKAGE

TEMPLATE = PACKAGE / "commands" / "template"


def run(args: Namespace) -> int:
    """Make the project; return the exit code."""
    folder: Path = args.folder
    name = folder.name.replace("-", "_")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise BadInput(f"{folder.name!r} cannot be the name of a package; take letters, digits and _")
    if importlib.util.find_spec(name) is not None:
        raise BadInput(f"there is a module {name} already, which the project would hide; take another name")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror}; take another name") from None
    for path in TEMPLATE.rglob("*"):
        if path.is_file():
            to = str(path.relative_to(TEMPLATE)).replace("NAME", name).replace("dot-", ".")
            target = folder / to.removesuffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text(encoding="utf-8").replace("NAME", name), encoding="utf-8")
    shutil.copytree(PACKAGE / "schema", folder / ".schema")
    args.emit({"folder": str(folder.absolute()), "package": name})
    print((HELP / "made.txt").read_text(encoding="utf-8").replace("FOLDER", str(folder)), end="")
    return 0
