"""The JSON schemas for editors: up to date, true of conf/, and able to find what is wrong."""

import json
import re
from pathlib import Path

import pytest
import yaml

import schema
from tracklight.paths import CONF, PACKAGE, ROOT

FOLDER = PACKAGE / "schema"
TEMPLATE = PACKAGE / "commands" / "template"
KINDS = {
    "null": type(None),
    "boolean": bool,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}
KNOWN = {
    "$schema",
    "definitions",
    "description",
    "$ref",
    "type",
    "enum",
    "pattern",
    "anyOf",
    "if",
    "then",
    "else",
}
KNOWN |= {"properties", "additionalProperties", "required"}


def is_valid(value, rule, document="config.json") -> bool:
    """Validate by the part of JSON schema that is used here, written from its specification (draft 7)."""
    assert rule.keys() <= KNOWN
    if "$ref" in rule:
        name, _, path = rule["$ref"].partition("#")
        name = name or document
        target = json.loads((FOLDER / name).read_text())
        for part in filter(None, path.split("/")):
            target = target[part]
        return is_valid(value, target, name)
    types = rule.get("type", list(KINDS))
    types = [types] if isinstance(types, str) else types
    if not any(isinstance(value, KINDS[t]) and (t == "boolean" or type(value) is not bool) for t in types):
        return False
    if "enum" in rule and not any(value == each and type(value) is type(each) for each in rule["enum"]):
        return False
    if "pattern" in rule and isinstance(value, str) and not re.search(rule["pattern"], value):
        return False
    if "anyOf" in rule and not any(is_valid(value, each, document) for each in rule["anyOf"]):
        return False
    if "if" in rule:
        branch = "then" if is_valid(value, rule["if"], document) else "else"
        if branch in rule and not is_valid(value, rule[branch], document):
            return False
    if not isinstance(value, dict):
        return True
    if any(key not in value for key in rule.get("required", ())):
        return False
    properties = rule.get("properties", {})
    if rule.get("additionalProperties") is False and value.keys() - properties.keys():
        return False
    return all(is_valid(value[key], each, document) for key, each in properties.items() if key in value)


def check(path: Path, text: str | None = None) -> bool:
    group = "config" if path.parent.name == "conf" else path.parent.name
    return is_valid(yaml.safe_load(text or path.read_text()) or {}, {"$ref": f"{group}.json"})


def test_the_schemas_are_those_that_the_script_writes(tmp_path):
    schema.write(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == written, "run scripts/schema.py"


FILES = [
    p
    for folder in (CONF, TEMPLATE / "conf")
    for p in sorted(folder.rglob("*.yaml"))
    if "hydra" not in p.parts
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_of_conf_is_valid(path):
    assert check(path)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("optimizer/sgd.yaml", "lr: 0.01", "lr: fast"),
        ("optimizer/sgd.yaml", "nesterov: false", "nesterov: 0"),
        ("trainer/default.yaml", "max_epochs: 100", "max_epoch: 100"),
        ("trainer/default.yaml", "accelerator: auto", "accelerator: tpus"),
        ("trainer/default.yaml", "precision: 32-true", "precision: 31-true"),
        ("tracking/mlflow.yaml", "enabled: true", "enabled: 1"),
        ("sweep/default.yaml", "sampler: tpe", "sampler: tpee"),
        ("model/mlp.yaml", "max_epochs: 5", "max_epochs: five"),
        ("experiment/seed_mlp.yaml", "metric: train", "metrik: train"),
        ("config.yaml", "seed: 0", "seed: zero"),
    ],
)
def test_what_is_wrong_in_a_file_is_found(file, before, after):
    text = (CONF / file).read_text()
    assert before in text
    assert not check(CONF / file, text.replace(before, after))


@pytest.mark.parametrize("value", ["16-mixed", "bf16-true", "32", 32, "null"])
def test_what_the_rules_accept_is_valid(value):
    text = (CONF / "trainer" / "default.yaml").read_text().replace("32-true", str(value))
    assert check(CONF / "trainer" / "default.yaml", text)


def test_names_of_which_a_rule_gives_examples_alone_are_valid():
    text = (
        (CONF / "trainer" / "default.yaml")
        .read_text()
        .replace("strategy: auto", "strategy: fsdp_cpu_offload")
    )
    assert "cpu_offload" in text and check(CONF / "trainer" / "default.yaml", text)
    text = (CONF / "sweep" / "default.yaml").read_text().replace("storage: null", "storage: postgresql://a/b")
    assert "//a/b" in text and check(CONF / "sweep" / "default.yaml", text)


def test_each_group_of_conf_has_a_schema_and_a_line_in_a_new_projects_settings():
    settings = json.loads((TEMPLATE / "dot-vscode" / "settings.json").read_text())["yaml.schemas"]
    groups = {path.parent.name for path in CONF.glob("*/*.yaml")}
    assert {f".schema/{group}.json": f"conf/{group}/*.yaml" for group in groups} == settings
    assert {path.stem for path in FOLDER.iterdir()} == groups | {"config"}
    assert (ROOT / "scripts" / "schema.py").is_file()


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("tracking/mlflow.yaml", "uri: ${oc.env:MLFLOW_TRACKING_URI,null}", "uri: http://h:1"),
        ("sweep/default.yaml", "storage: null", "storage: postgresql://u@h/d"),
        ("trainer/default.yaml", "strategy: auto", "strategy: deepspeed_stage_2"),
        ("trainer/default.yaml", "strategy: auto", "strategy: {_target_: a.Strategy}"),
        ("trainer/default.yaml", "profiler: null", "profiler: {_target_: a.Profiler}"),
        ("trainer/default.yaml", "plugins: null", "plugins: [{_target_: a.Plugin}]"),
    ],
)
def test_a_value_that_a_rule_accepts_beside_the_words_that_it_names_is_valid(file, before, after):
    text = (CONF / file).read_text()
    assert before in text and check(CONF / file, text.replace(before, after))
