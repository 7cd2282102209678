"""Presets keep what their first lines promise, and print it."""

import re
from pathlib import Path

import pytest

from tracklight.paths import CONF

CLAIM = re.compile(r"([a-z]+/\w+) (below )?([\d.e-]+)(?: to ([\d.]+))?")
STEPS = re.compile(r"([a-z]+/\w+) at (\d+) steps")
FALLBACK = ("data.root=nowhere", "data.download=false", "data.fallback=true")
QUICK = re.compile(r"# Time: .*(under a second|\b\d+ s) of training on a two-core CPU$", re.M)
SLOW = (pytest.mark.slow, pytest.mark.full_mnist)
ON_IMAGES = re.compile("ml|mnist|simard|srivastava|fashion")
FASHION = Path("/usr/share/datasets/fashion-mnist")
LONG = "longley"  # three thousand epochs
PRESETS = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))]


def expected(preset: str) -> str:
    return (CONF / "experiment" / f"{preset}.yaml").read_text().splitlines()[2].removeprefix("# Expected: ")


@pytest.mark.filterwarnings("ignore:data.root=nowhere. no MNIST files:UserWarning")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=SLOW if ON_IMAGES.search(name) else SLOW[:1] if name == LONG else ())
        for name in PRESETS
    ],
)
def test_a_preset_prints_what_its_header_promises(train, spare_model, capsys, mnist_root, preset):
    if not QUICK.search((CONF / "experiment" / f"{preset}.yaml").read_text()):
        pytest.skip("takes minutes, or was not measured")
    words = ("model=mlp", *FALLBACK) if preset == "debug" else ()
    if preset.startswith("fashion") and not FASHION.is_dir():
        pytest.skip(f"needs {FASHION} (Debian: dataset-fashion-mnist)")
    if ON_IMAGES.search(preset):
        words = (f"data.root={FASHION if preset.startswith('fashion') else mnist_root}",)
    finished = train(f"experiment={preset}", *words, "trainer.accelerator=cpu", "tracking.figures=false")
    printed, text = capsys.readouterr().out, expected(preset)
    claims, steps = CLAIM.findall(text), STEPS.findall(text)
    assert claims or steps
    for metric, is_below, value, upper in claims:
        found = float(re.findall(rf"{metric} (\S+)", printed)[-1])
        low, high = float(value) * 0.995, float(value) * 1.005  # the digits that a header gives
        if is_below or upper:
            low, high = (-1.0, float(value)) if is_below else (float(value), float(upper))
        assert low <= found <= high, (metric, found)
    for metric, number in steps:
        assert [step for step, _ in finished.history(metric)] == [*range(1, int(number) + 1)]
