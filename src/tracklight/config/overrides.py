"""Hydra's flags and overrides, parsed and checked before Hydra composes; and its errors in one line."""

import difflib
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep, Transformer
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracklight.config.hydra_internals import unresolved_root
from tracklight.config.rules import OWNED, RULE_OF, mode_of, nested_items
from tracklight.config.types import read_conf, value_in_conf
from tracklight.errors import BadInput
from tracklight.paths import CONF, PROJECT, TRAIN, group_choices
from tracklight.redact import STARS, redact

FUNCTIONS = ("interval", "range", "choice", "tag", "glob", "shuffle", "sort")  # of Hydra's grammar
WITHOUT_CLASS = ("score", "tracking", "sweep")  # groups that no class takes as its arguments
RUN_KEYS = ("resume", "init_from")  # 1234e567 is a run id, not a number
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
BUILT = ("model", "data", "optimizer", "scheduler", "callbacks")  # the arguments of classes
# Keys, and what people type for the last part of each.
ALIASES = {
    "trainer.max_epochs": "epochs num_epochs n_epochs",
    "trainer.max_steps": "steps num_steps iterations",
    "trainer.devices": "gpus num_gpus num_devices",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "wd",
    "data.batch_size": "batch bs",
    "model.hidden": "layers units width hidden_size hidden_dim",
    "tracking.run_name": "name",
}


class _FlagsParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; `{TRAIN} --help` shows what can be given")


def flags_parser() -> ArgumentParser:
    """Return a parser like Hydra's own, whose lazy help text Python 3.14 refuses."""
    parser = _FlagsParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("overrides", nargs="*", help="KEY=VALUE, GROUP=CHOICE")
    add("--help", "-h", action="store_true", help="the keys and groups of this program")
    add("--hydra-help", action="store_true", help="Hydra's help")
    add("--version", action="version", version=f"Hydra {hydra.__version__}")
    add("--cfg", "-c", choices=("job", "hydra", "all"), help="print the config, run nothing")
    add("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    add("--package", "-p", help="with --cfg: only this part")
    add("--run", "-r", action="store_true", help="a single run")
    add("--multirun", "-m", action="store_true", help="a run for each value of a list")
    add("--shell-completion", "-sc", action="store_true", help="install=SHELL or uninstall=SHELL")
    add("--config-path", "-cp", help="a folder in place of conf/")
    add("--config-name", "-cn", help="a file in place of config.yaml")
    add("--config-dir", "-cd", help="a further folder of config files, before conf/")
    add("--experimental-rerun", help="refused: it would run a pickle")
    add("--json", action="store_true", help="print what came of it as JSON, and all else on stderr")
    add("--info", "-i", const="all", nargs="?", choices=INFO, help="what Hydra found")
    return parser


def parse_flags(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse Hydra's flags and the overrides between them."""
    for word in argv:
        if word.startswith("--") and "." in word.partition("=")[0]:
            raise BadInput(f"{word}: keys take no dashes; write {word.lstrip('-')}")
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise BadInput("--experimental-rerun would run a pickle; reproduce a run by its id instead")
    return args


def check_overrides(words: Sequence[str], *, multirun: bool) -> list[str]:
    """Check the overrides of a command line; return them for Hydra, run ids quoted, a metric with its mode.

    Raises:
        BadInput: One is empty, given twice, of a key that tracklight sets, or needs `-m`.
    """
    quoted = [_quote_run_id(word) for word in words]
    seen: dict[str, str] = {}
    for word, override in zip(words, parse_overrides(quoted), strict=True):
        if override.is_hydra_override():
            continue
        key = override.get_key_element().lstrip("+~")
        if key in seen:
            raise BadInput(f"{key} is given twice, as {seen[key]} and as {word}; keep one of them")
        seen[key] = word
        if override.is_delete():
            _check_deletion(word, key)
        else:
            _check_override(word, override, key, multirun)
    metric = seen.get("score.metric", "").partition("=")[2]
    if metric and "score.mode" not in seen and "${" not in metric:  # else that of the data's own metric
        quoted.append(f"score.mode={mode_of(metric)}")
    return quoted


def _check_deletion(word: str, key: str) -> None:
    """Refuse to delete what every run reads; an argument of a class may go."""
    group, _, name = key.partition(".")
    if name and group in BUILT:
        return
    choices = group_choices(key)
    cure = f"can be {', '.join(choices)}" if choices else "can be set to a value, or to null"
    raise BadInput(f"{word}: {key} cannot be deleted, for every run reads it; it {cure}")


def _check_override(word: str, override: Override, key: str, multirun: bool) -> None:
    listed = word.partition("=")[2]
    if listed == "":
        raise BadInput(f"{word} has no value; write {key}=null for none, '{key}=\"\"' for no text")
    owned = key.removeprefix("trainer.")
    if owned != key and owned in OWNED:
        raise BadInput(f"{word}: tracklight sets {key} itself; use {OWNED[owned]}")
    if key.partition(".")[0] == "overrides":
        raise BadInput(f"{word}: tracklight fills overrides itself; type what it should hold instead")
    if not multirun and key.partition(".")[0] == "sweep":
        raise BadInput(f"{word} is of sweeps, and this is a single run; add -m, or drop it")
    check_no_nested_sweep(word, override)
    if key.startswith("@"):
        raise BadInput(f"{word}: there is no group before @; write {key[1:]}={listed}")
    if not override.is_sweep_override():
        choices = group_choices(key)
        value: Any = override.value()  # of callbacks alone, several at once make sense
        is_several = key == "callbacks" and isinstance(value, list) and all(each in choices for each in value)
        if choices and ("${" in listed or not (is_several or isinstance(value, str | dict))):
            raise BadInput(f"{word} names no file of conf/{key}; {key} can be {', '.join(choices)}")
    elif not multirun and override.is_interval_sweep():
        raise BadInput(f"{word} is an interval; add -m to search it")
    elif not multirun:
        values = getattr(override.value(), "list", None)  # of a range there is none
        rule, example = RULE_OF.get(key), value_in_conf(key, None)
        is_list = rule.values.accepts(values) if rule else isinstance(example, list | None)
        cure = f", or write '{key}=[{listed}]' for one value that is a list" if values and is_list else ""
        raise BadInput(f"{word} is a list of values; add -m to run each of them{cure}")


def check_added(cfg: DictConfig, words: Iterable[str], groups: Iterable[str]) -> None:
    """Refuse to add a key that nothing reads to a config: it would be recorded, and change nothing."""
    for word in words:
        if not word.startswith("+"):
            continue
        key = word.lstrip("+").partition("=")[0].partition("@")[0]
        trees = dict(read_conf(*filter(None, (PROJECT.conf, CONF))))
        name, known = key.partition(".")[0], [*trees[CONF / "config.yaml"], *groups, "experiment"]
        if name in WITHOUT_CLASS:
            known = [f"{name}.{each}" for tree in trees.values() for each in tree.get(name) or ()]
            name = ".".join(key.split(".")[:2])
        is_interpolated = re.search(rf"\$\{{{re.escape(name)}[.}}\[]", OmegaConf.to_yaml(cfg))
        if name not in known and not is_interpolated:
            raise BadInput(f"{word} adds a key that nothing reads{_nearest(name, known)}")


def check_no_nested_sweep(word: str, override: Override) -> None:
    """Refuse an interval or a range within a list: Hydra parses it, and cannot expand it."""
    values = override.value()
    inside = getattr(values, "list", values)  # of a choice, or of a plain list
    if isinstance(inside, list) and any(isinstance(each, Sweep) for each in inside):
        raise BadInput(f"{word}: an interval or a range stands alone, as in KEY=interval(1,2)")


def parse_overrides(words: Iterable[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar."""
    words = list(words)
    with explaining(words):
        return OverridesParser.create().parse_overrides(words)


@contextmanager
def explaining(words: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise for the words of a command line into bad input."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(explain(error, words)) from error


def redact_command(argv: Sequence[str]) -> str:
    """Return a command line as one would type it, secrets redacted: `argv` are its words."""
    words = redact([_redact_override(word) for word in argv])
    return shlex.join(words).replace(shlex.quote(STARS), STARS)


def _redact_override(word: str) -> str:
    """Redact an override, parsed if it is one, and an option such as `-pPASSWORD`."""
    key, equals, text = word.partition("=")
    if not equals:
        return re.sub("^(-p).+", rf"\1{STARS}", word)
    value: Any = text
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(word)
        if text[:1] in ("{", "[") and not override.is_sweep_override():
            value = override.value()
    ((name, safe),) = redact({key: value}).items()
    if (name, safe) == (key, value):
        return word
    return f"{name}={safe if isinstance(safe, str) else Transformer.str(safe)}"


def split_for_resume(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those to compose with and those for the stored config of a run.

    Returns:
        All and none, unless `resume=RUN_ID`: then those of this command, and all but `resume`.

    Raises:
        BadInput: A group is chosen beside `resume=RUN_ID`, or an interpolation is given.
    """
    parsed = parse_overrides(words)
    keys = {word: override.key_or_group for word, override in zip(words, parsed, strict=True)}
    resume = next((word for word, key in keys.items() if key == "resume"), "")
    run_id = resume.partition("=")[2].strip("'\"")
    if run_id in ("", "auto", "null"):
        return list(words), []
    of_command = ("resume", "allow_changes", "allowed_targets", "tracking", "hydra")
    now = [word for word, key in keys.items() if key.partition(".")[0] in of_command]
    for word, key in keys.items():
        if group_choices(key.partition("@")[0]):
            problem = f"{word} chooses a group, but resume={run_id} takes the run's own config"
            cure = f"leave it out, set single keys, {key}.KEY=VALUE, or start a new run without resume"
            raise BadInput(f"{problem}; {cure}")
        if "${" in word and word not in now:
            raise BadInput(f"{word}: a stored config is plain text; write the value itself")
    return now, [word for word, key in keys.items() if key != "resume" and key[:6] != "hydra."]


def explain(error: Exception, words: Sequence[str] = (), config_dir: str | None = None) -> str:
    """Return in one line what Hydra or OmegaConf objects to in these words, and what would work."""
    if isinstance(error, OverrideParseException):
        word, text = str(error.override), str(error).removeprefix("LexerNoViableAltException: ")
        reason = _explain_call(word) or _first_line(text) + _quote(word, words)
        return f"cannot read {word}: {reason}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if error.missing_cfg_file == "hydra/launcher/submitit_slurm":
            return "Slurm jobs need a plugin of Hydra: pip install 'tracklight[slurm]'"
        if not group:
            return f"there is no {choice}.yaml there; --config-dir=FOLDER adds files to those of conf/"
        options = sorted(error.options or [])
        hint = _nearest(choice, options)
        return f"{group}={choice} is not there; {group} can be {', '.join(options)}{hint}"
    message, cause = str(error), error.__cause__
    if isinstance(error, yaml.YAMLError):  # on several lines, of which one names the file
        return " ".join(message.split())
    if isinstance(error, UnicodeDecodeError):
        folders = map(Path, filter(None, (config_dir, PROJECT.conf, CONF)))
        for path in (path for folder in folders for path in folder.rglob("*.yaml")):
            if error.object in path.read_bytes():
                return f"{path} is not UTF-8, {message}"
    if isinstance(cause, OmegaConfBaseException):
        if match := re.match(r"Could not override '([^']+)'", message):
            items = nested_items(unresolved_root(cause.parent_node))
            keys = [key for key, _ in items if key.split(".")[0] != "hydra"]
            # Of a mapping that is merged into a group, the key that the group lacks.
            return unknown_key(str(cause.full_key) if match[1] in keys else match[1], keys)
        return f"{_first_line(message)}: {_first_line(str(cause))}".lstrip(": ")
    if match := re.match(r"Could not delete from config. '(.+)' does not exist", message):
        return f"~{match[1]}: there is nothing to delete: {match[1]} is null already, or no key"
    if re.match(r"Could not append|Multiple values|\S+ appears more than once", message):
        for word in words:
            key = word.lstrip("+").partition("=")[0].partition("@")[0]
            if word[:1] == "+" and key in re.findall(r"\w[\w./]*\b", message):
                return f"{word}: {key} is there already; leave out the +: {word.lstrip('+')}"
    if match := re.match(r"Could not override '(\w+)@", message):
        return f"{_first_line(message)} Write {match[1]}=CHOICE, without @"
    return _first_line(message)


def _quote(word: str, words: Sequence[str]) -> str:
    """Say how a word that cannot be parsed is written: as text, or with what a space cut off."""
    start = words.index(word) if word in words else len(words)
    joined = [" ".join(words[start:end]) for end in range(start + 2, min(start + 20, len(words)) + 1)]
    key, equals, value = word.partition("=")
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    as_text = [f'{key}="{text}"'] if equals and value.count("[") == value.count("]") else []
    for candidate in joined + as_text:
        with suppress(HydraException):
            OverridesParser.create().parse_override(candidate)
            cut = "a space cuts it; " if candidate in joined else ""
            return f"; {cut}write {shlex.quote(candidate)}"
    return "; write key=value, text 'key=\"a, b\"'"


def _explain_call(word: str) -> str:
    """Explain what is wrong with a function of the grammar; empty where nothing is."""
    call = re.search(r"=\s*(\w+)\(\s*(\))?", word)
    if call is None:
        return ""
    name, is_empty = call.groups()
    if name not in FUNCTIONS and (hint := _nearest(name, FUNCTIONS)):
        return f"no function {name}{hint}"
    if is_empty:
        return f"{name}() is empty; it takes values: (A,B)"
    return "an interval lies between two numbers: interval(0.1,1)" if "interval(" in word else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a key that is not there: the nearest one, and how to add it if one can."""
    others = [name for name in known if "_target_" not in name and not key.startswith(f"{name}.")]
    hint = _nearest(key, others)
    addable = "." in key and key.partition(".")[0] not in WITHOUT_CLASS
    adds = f", +{key}=VALUE adds it" if addable else ""
    return f"unknown key {key}{hint}; `{TRAIN} --cfg job` shows all{adds}"


def _nearest(word: str, candidates: Sequence[str]) -> str:
    """Suggest by the whole name, else by its last part: `lr` means `optimizer.lr`."""
    typed = word.rpartition(".")[2]
    found = [key for key, names in ALIASES.items() if typed in names.split() and key in candidates]
    found = found or difflib.get_close_matches(word, candidates, n=1)
    if not found:
        last = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        found = [last[part] for part in difflib.get_close_matches(typed, last, n=1)]
    return f"; did you mean {found[0]}?" if found else ""


def _quote_run_id(word: str) -> str:
    """Return a word as Hydra should read it."""
    key, _, value = word.partition("=")
    if re.fullmatch(r"tracking\.tags(\..*)?", key):  # any name of a tag will do
        return f"++{word}"
    return f"{key}='{value}'" if key in RUN_KEYS and re.fullmatch(r"[0-9a-f]+", value) else word


def _first_line(text: str) -> str:
    return " ".join(text.strip().split("\n")[0].split())
