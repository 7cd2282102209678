"""Saved views of MLflow's UI: the columns, the order and the charts in which it shows runs.

A tag of the experiment holds each, as MLflow 3.17.2 reads it; its name in the page's address opens it.
"""

import json
from collections.abc import Sequence
from typing import Any

from tracklight.tracking.tags import EPOCHS_TAG, PARENT_TAG, SCORE

PREFIX = "mlflow.sharedViewState."
MAX_PARAMS = 12  # an experiment's tag holds 5000 characters
SECTION = "compared"  # of the charts
EXPERIMENT = "runs"  # name of the view of a whole experiment
# Its parameters until it is known which vary.
USUAL = ("model", "optimizer", "optimizer.lr", "data.batch_size", "trainer.max_epochs", "seed")
NEWEST_FIRST = {"orderByKey": "attributes.start_time", "orderByAsc": False}


def view_name(sweep_id: str) -> str:
    """Return the name of the view of a sweep, by the id of its parent run."""
    return f"sweep-{sweep_id[:8]}"


def page(experiment_id: str | None, view: str | None = None) -> str:
    """Return the page of an experiment's runs in MLflow's UI, as it is or by a saved view; or of all."""
    # MLflow's first page is made for traces of language models: it shows no run.
    of_one = f"/{experiment_id}/runs" if experiment_id else ""
    shown = f"&viewStateShareKey={view}" if view else ""
    return f"/#/experiments{of_one}?workflowType=machine_learning{shown}"


def experiment_tags() -> dict[str, str]:
    """Return the tag of a new experiment's view: the newest run first, its score and usual parameters."""
    return {PREFIX + EXPERIMENT: json.dumps(NEWEST_FIRST | {"selectedColumns": _columns(USUAL)})}


def _columns(params: Sequence[str]) -> list[str]:
    # A run's parameter stays when the run is extended; its tag tells the epochs.
    own = {"trainer.max_epochs": f"tags.`{EPOCHS_TAG}`"}
    return [f"metrics.`{SCORE}`", *(own.get(name, f"params.`{name}`") for name in params)]


def save_view(
    client: Any,
    experiment_id: str,
    params: Sequence[str],  # that vary
    metrics: Sequence[str],  # whose curves are drawn
    sweep_id: str = "",  # of the parent run: then the view is of this sweep, the best run first
    mode: str = "",  # of the sweep's score
) -> None:
    """Save the view of an experiment, the newest run first, or that of a sweep."""
    name, title, shown = EXPERIMENT, "Runs", NEWEST_FIRST
    if sweep_id:
        name, title = view_name(sweep_id), "Sweep"
        best_first = {"orderByKey": f"metrics.`{SCORE}`", "orderByAsc": mode == "min"}
        shown = {"searchFilter": f"tags.`{PARENT_TAG}` = '{sweep_id}'", **best_first}
    params = [*params][:MAX_PARAMS]
    axes = {"type": "PARALLEL", "selectedParams": params, "selectedMetrics": [SCORE], "showAllRuns": True}
    lines = [{"type": "LINE", "metricKey": m, "displayName": m, "lineSmoothness": 0} for m in metrics]
    of_all = {"metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    view = shown | {
        "selectedColumns": _columns(params),
        "compareRunCharts": [
            {"uuid": f"{SECTION}-{at}", **of_all, **chart} for at, chart in enumerate([axes, *lines])
        ],
        "compareRunSections": [{"uuid": SECTION, "name": title, "display": True, "isReordered": False}],
        "isAccordionReordered": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    client.set_experiment_tag(experiment_id, PREFIX + name, json.dumps(view))
