"""The recording of a terminal in README: what is typed, and what is seen where nothing moves."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def recording():
    pytest.importorskip("pyte", reason="needs pyte: of the extra docs")
    spec = importlib.util.spec_from_file_location("recording", ROOT / "scripts" / "recording.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(svg: str) -> list[str]:
    """The frames in their order, as text; the first is what a viewer without animations draws."""
    root = ET.fromstring(svg)
    rows = {group.get("id"): "".join(group.itertext()) for group in root.iter(f"{SVG}g")}
    height = float((root.get("viewBox") or "").split()[-1])
    found: dict[int, list[str]] = {}
    for use in root.iter(f"{SVG}use"):
        row = rows[(use.get("href") or "").removeprefix("#")]
        found.setdefault(int(float(use.get("y") or 0) // height), []).append(row)
    return ["\n".join(found.get(index, [])) for index in range(max(found) + 1)]


def test_the_finished_screen_is_seen_where_nothing_moves_and_each_command_as_a_whole(recording):
    def session():
        yield 0.0, b"$ "
        for key in "train":
            yield recording.KEY_S, key.encode()
        yield 0.5, b"\r\n"
        yield 1.0, b"loss 1\r\n"
        yield recording.KEY_S, b"loss 0\r\n"
        yield recording.READ_S, b""

    shots = list(recording.frames(session()))
    svg = recording.film(shots)
    frames = shown(svg)
    assert frames[0] == frames[-1] == "$ train\nloss 1\nloss 0"
    assert "$ train" in frames
    whole_s = shots[frames.index("$ train") - 1][0]
    assert whole_s <= recording.STEP_S + len("train") * recording.KEY_S  # and not as it is answered
    assert re.search(r"reduced-motion:reduce\){#film{animation:none}}", svg)


def test_the_recording_begins_and_ends_with_the_tables_that_are_printed_today():
    frames = shown((ROOT / "docs" / "recording.svg").read_text())
    assert frames[0] == frames[-1]
    for text in (
        "look   make ui; while it runs",
        "view   http://127.0.0.1:5001/",
        "of 3 settings, max first",
    ):
        assert text in frames[0]
