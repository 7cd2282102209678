"""Completes a command line: commands, groups, their choices, keys, values.

The shell starts this file at every Tab, so neither Hydra nor anything else that takes time is imported.
"""

import re
import sys
from argparse import Namespace

import yaml

from tracklight.commands.parser import COMMANDS, HELP
from tracklight.config.rules import RULE_OF, nested_items
from tracklight.config.types import LOADER, read_conf
from tracklight.paths import CONF, PROJECT, group_choices


def run(args: Namespace) -> int:
    """Print the script for the shell; return the exit code."""
    script = (HELP / "completion.bash").read_text(encoding="utf-8").replace("PYTHON", sys.executable)
    args.emit({"script": script})
    print(script, end="")
    return 0


def complete(line: str) -> list[str]:
    """Return what the last word of a line can become."""
    _, *words, last = line.split(" ")
    if not words:
        found = [f"{each} " for each in ("train", *COMMANDS)]
    elif words[0] != "train":
        found = ["last ", "best "]
    else:
        typed = dict(word.split("=", 1) for word in words if "=" in word)
        folders, items = [each for each in (CONF, PROJECT.conf) if each], {}
        for path, tree in read_conf(*folders):
            group, name = path.parent.name, path.stem
            if typed.get(group, "" if group == "experiment" else name) == name:  # else another is chosen
                items |= {key: value for key, value in nested_items(tree) if "defaults" not in key}
        key = last.partition("=")[0]
        if "=" in last:
            found = [f"{key}={value} " for value in group_choices(key) or _values(key, items.get(key))]
        else:
            groups = [path.parent.name for folder in folders for path in folder.glob("[!h]*/*.yaml")]
            keys = [each for each, value in items.items() if not isinstance(value, dict)]
            found = [f"{each}=" for each in (*groups, *keys)]
    return sorted({each for each in found if each.startswith(last)})


def _values(key: str, example: object) -> list[str]:
    """Return the values of a key, where they can be listed."""
    named = re.split(", | or ", RULE_OF[key].values.description) if key in RULE_OF else []
    accepted = [each for each in named if RULE_OF[key].values.accepts(yaml.load(each, LOADER))]
    return accepted or (["true", "false"] if isinstance(example, bool) else [])


if __name__ == "__main__":
    for each in complete(sys.argv[1]):
        print(each.rpartition("=")[2] if "=" in sys.argv[1].rpartition(" ")[2] else each)
