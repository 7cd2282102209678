"""The notebook of the docs: executed anew, it shows what it shows."""

import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tracklight.paths import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [each.text if each.output_type == "stream" else each.data["text/plain"] for each in outputs]


@pytest.mark.slow
def test_the_notebook_shows_what_its_cells_give(tmp_path: Path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "pyproject.toml").write_text('[tool.tracklight]\npackage = "mine"\n')
    (tmp_path / "mine").mkdir()
    stored = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        copy.deepcopy(stored), timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    executed = client.execute()
    assert len(shown(stored)) == 5
    assert shown(executed) == shown(stored)
