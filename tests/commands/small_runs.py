"""Runs trained in a moment, in the process of the tests."""

from pathlib import Path
from typing import Any

from tracklight.tracking.store import connect

QUICK = ("num_threads=1", "trainer.enable_progress_bar=false", "tracking.figures=false")
IMAGES = (
    "model=mlp",
    "data.download=false",
    "data.fallback=true",
    "data.num_val=500",
    "trainer.max_epochs=2",
)


def train(directory: Path, *overrides: str, uri: str | None = None, **more: Any) -> str:
    """Train and return the run's id; `more` goes to `experiment.run`."""
    from tracklight.config.compose import compose
    from tracklight.experiment.train import run

    where = (f"tracking.dir={directory}", f"tracking.uri={uri or 'null'}")
    run(compose([*overrides, *QUICK, *where]), **more)
    store = connect(uri, directory)
    return store.search("attributes.status = 'FINISHED'")[0].info.run_id
