"""Write the JSON schemas by which an editor completes and checks the files of conf/.

They are derived from conf/ and from the rules of its values, into src/tracklight/schema: config.json of
a whole config, and a file for each group.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tracklight.config.overrides import WITHOUT_CLASS
from tracklight.config.rules import RULE_OF
from tracklight.config.types import read_conf
from tracklight.paths import CONF, PACKAGE

FOLDER = PACKAGE / "schema"
CLOSED = (*WITHOUT_CLASS, "trainer")  # groups whose keys are all known
# A rule that accepts one of these has no list of values.
OPEN = ("text", "0123abcd", "0,1", "ddp_find_unused_parameters_true", "sqlite:///a.db")
PROBES: tuple[Any, ...] = (*OPEN, True, 0, 1, 5, 0.5, [], [1], [0.5], ["a"], {}, {"_target_": "CLASS"})
TYPES = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
DRAFT = "http://json-schema.org/draft-07/schema#"


def schemas() -> dict[str, dict[str, Any]]:
    """Return the schemas by the name of their file."""
    examples: dict[str, list[Any]] = {}
    comments: dict[str, str] = {}
    for path, tree in read_conf(CONF):
        for name, value in tree.items():
            if name in ("defaults", "hydra"):
                continue
            items = value.items() if isinstance(value, dict) and name != "callbacks" else ()
            for key, each in [(name, value)] if not isinstance(value, dict) else items:
                whole = key if key == name and not isinstance(value, dict) else f"{name}.{key}"
                examples.setdefault(whole, []).append(each)
        for key, comment in re.findall(r"^ *(\w+):[^#\n]*# (.*)$", path.read_text(), re.M):
            comments.setdefault(key if path.parent == CONF else f"{path.parent.name}.{key}", comment)
    groups = sorted({path.parent.name for path in CONF.glob("[!h]*/*.yaml")})
    sections = sorted({*groups, *(key.partition(".")[0] for key in examples if "." in key)} - {"experiment"})
    defined = {}
    for section in sections:
        keys = {key.partition(".")[2]: key for key in examples if key.startswith(f"{section}.")}
        found = {name: _value(key, examples[key], comments.get(key, "")) for name, key in keys.items()}
        defined[section] = {"type": "object", "properties": found | {"defaults": {"type": "array"}}}
        defined[section]["additionalProperties"] = section not in CLOSED
    own = {key: _value(key, each, comments.get(key, "")) for key, each in examples.items() if "." not in key}
    config = {
        "$schema": DRAFT,
        "definitions": defined,
        "type": "object",
        "properties": own
        | {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
        | {section: {"$ref": f"#/definitions/{section}"} for section in sections},
    }
    written = {"config": config, "experiment": {"$schema": DRAFT, "$ref": "config.json"}}
    for group in groups:
        if group != "experiment":  # a file says whether it is `@package _global_` by the section in it
            whole, part = ({"$ref": f"config.json{end}"} for end in ("", f"#/definitions/{group}"))
            written[group] = {"$schema": DRAFT, "if": {"required": [group]}, "then": whole, "else": part}
    return written


def _value(key: str, examples: list[Any], comment: str) -> dict[str, Any]:
    """Return the schema of a value: what its rule accepts, else the types that it has in conf/."""
    rule = RULE_OF.get(key)
    described = "; ".join(filter(None, (comment, rule.values.description if rule else "")))
    about = {"description": described} if described else {}
    if rule and rule.ours_only:  # a class of one's own may mean something else
        return about
    if rule is None:
        types = {TYPES.get(type(each)) for each in examples}
        if None in types or key.startswith(("model.", "data.")) or any("${" in str(e) for e in examples):
            return about
        null = [] if types == {"boolean"} else ["null"]
        return about | {"anyOf": [{"type": [*sorted(filter(None, types)), *null]}, INTERPOLATION]}
    is_number = rule.values.accepts(7)
    words = [yaml.safe_load(each) for each in re.split("one of |, | or ", rule.values.description)]
    words = [each for each in words if each is not None and rule.values.accepts(each)]
    words = [each for each in words if isinstance(each, str) or (isinstance(each, int) and not is_number)]
    probes = [*PROBES, yaml.safe_load(rule.example), *examples]
    accepted = [each for each in probes if rule.values.accepts(each)]
    types = {TYPES[type(each)] for each in accepted if type(each) in TYPES}
    options: list[dict[str, Any]] = [{"type": "null"}] if rule.values.accepts(None) else []
    if words and not any(map(rule.values.accepts, OPEN)):
        options.append({"enum": words})
        types -= {TYPES[type(each)] for each in words}
    options += [{"type": sorted(types)}] if types else []
    return about | {"anyOf": [*options, INTERPOLATION]}


def write(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (folder / f"{name}.json").write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(FOLDER)
