"""Command lines of training, mutated at random: what people mistype, and what nobody would."""

import functools
import random
from collections.abc import Iterator

from tracklight.config.compose import compose
from tracklight.config.rules import nested_items
from tracklight.errors import BadInput
from tracklight.paths import CONF

FLAGS = (
    *(["-m"], ["--multirun"], ["--cfg", "job"], ["-c"], ["--cfg=all", "--resolve"], ["--info"]),
    *(["--info=plugins"], ["--help"], ["--hydra-help"], ["--version"], ["--nonsense"], ["-p", "trainer"]),
    *(["--config-path=nowhere"], ["--config-name", "nothing"], ["-cd", "."], ["-sc", "install=bash"], ["--"]),
    *(["--experimental-rerun=x"], ["-r"], ["--lr=1"]),
)
ODD = (
    *("", "null", "true", "false", "no", "off", "maybe", "auto", "x", "last", "best", "min", "maximum"),
    *("-1", "0", "1", "3", "0.5", "1.5", "-0.1", "1e-3", "1e400", "nan", "inf", "-inf", "0x10", "1_000"),
    *("99999999999999999999", "-99999999999999999999", "0.1,0.2", "1,2,3", "range(1,3)", "interval(0,1)"),
    *("choice()", "choice(1,true,x)", "tag(log,interval(1e-3,1))", "sort(1,a)", "int(x)", "glob(*)"),
    *("[]", "[1]", "[1,2]", "[0.9]", "[a]", "[[1]]", "[1,", "]", "{}", "{a:1}", "{a:", "{_target_:x}"),
    *("${seed}", "${oc.select:seed}", "${oc.env:NO_SUCH}", "${nowhere}", "${", "???", "\\", "'", '"', '""'),
    *("'a b'", "a b", "a=b", "é", "@", "~", "../x", "/", "a\nb", "\t", "x" * 300, "simple", "00:00:00:01"),
    *(
        "torch.optim.SGD",
        "os.system",
        "torch.optim.Nothing",
        "tracklight.models.mlp.MLP",
        "{_target_: torch.nn.ReLU}",
    ),
)
# They would train for long, start processes, or wait for another machine.
LEFT_OUT = (
    "sweep.dry_run",
    "trainer.devices",
    "trainer.num_nodes",
    "sweep.workers",
    "trainer.max_epochs",
    "data.num_points",
)
CHOICES = {
    group: [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml"))]
    for group in ("optimizer", "scheduler", "callbacks", "data", "model")
}


@functools.cache
def items(choices: tuple[str, ...]) -> list[tuple[str, object]]:
    """Return the keys that these choices make, with their values; of none, where they do not go together."""
    try:
        cfg = compose((*choices, "tracking.dir=mlruns"))  # not beside train.py
    except BadInput:
        return items(())
    return [(key, value) for key, value in nested_items(cfg) if key not in LEFT_OUT]


def near(value: object, draw: random.Random) -> str:
    """Return a value like another: one that may well pass."""
    if isinstance(value, bool):
        return draw.choice(("true", "false", "null", "1"))
    if isinstance(value, int | float):
        return draw.choice(("0", "1", "2", "-1", "0.5", "1e-3", "1.0", "null", f"[{value}]", f"{value}"))
    if isinstance(value, list):
        return draw.choice(("[1]", "[0.5,0.5]", "[]", "[a]", "0.5", "null", "[2,2,2]"))
    return draw.choice(("null", "true", "1", "2", "0.5", "[1]", "x", "{a: 1}", f"{value}x"))


def mutate(text: str, draw: random.Random) -> str:
    """Damage a word as fingers and shells do."""
    place = draw.randrange(len(text) + 1)
    return draw.choice(
        (
            text[:place] + text[place + 1 :],
            text[:place] + draw.choice("=.,[]{}+~@$'\"\\ x0-") + text[place:],
            text[:place] + text[place : place + 2][::-1] + text[place + 2 :],
            draw.choice(("+", "++", "~", "--", "@", "-")) + text,
            text + draw.choice((".x", "=1", "@x", ",", " ", "=")),
            text.upper(),
            text.partition("=")[0],
        )
    )


def command_lines(seed: int) -> Iterator[list[str]]:
    """Yield command lines, each a few words of which one or more are odd, for ever."""
    draw = random.Random(seed)
    while True:
        groups = sorted(draw.sample(sorted(CHOICES), draw.choice((0, 1, 1, 2))))
        line = [draw.choice(CHOICES[group]) for group in groups]
        for key, value in draw.sample(items(tuple(line)), draw.choice((1, 1, 1, 2, 3))):
            odd = draw.choice(ODD) if draw.random() < 0.4 else near(value, draw)
            line.append(f"{draw.choice(('',) * 8 + ('+', '++'))}{key}={odd}")
        if draw.random() < 0.1:
            line.append(f"~{draw.choice(items(()))[0]}")
        if draw.random() < 0.15:
            place = draw.randrange(len(line))
            line[place] = mutate(line[place], draw)
        draw.shuffle(line)
        if draw.random() < 0.1:
            place = draw.randrange(len(line) + 1)
            line[place:place] = draw.choice(FLAGS)
        yield line
