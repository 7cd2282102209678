"""Saved views of MLflow's UI: the columns, the order and the charts in which it shows runs.

A tag of the experiment holds each, as MLflow 3.17.2 reads it; its name in the page's address opens it.
"""

import json
from collections.abc import Sequence
from typing import Any

from tracklight.tracking.tags import PARENT_TAG, SCORE

PREFIX = "mlflow.sharedViewState."
MAX_PARAMS = 12  # an experiment's tag holds 5000 characters
SECTION = "sweep"  # of the charts
EXPERIMENT = "runs"  # name of the view of a whole experiment
USUAL = ("model", "optimizer", "optimizer.lr", "data.batch_size", "trainer.max_epochs", "seed")  # its params


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
    """Return the tag of an experiment's view: the newest run first, with its score and usual parameters."""
    view = {"orderByKey": "attributes.start_time", "orderByAsc": False, "selectedColumns": _columns(USUAL)}
    return {PREFIX + EXPERIMENT: json.dumps(view)}


def _columns(params: Sequence[str]) -> list[str]:
    return [f"metrics.`{SCORE}`", *(f"params.`{name}`" for name in params)]


def save_view(
    client: Any, experiment_id: str, sweep_id: str, params: Sequence[str], metrics: Sequence[str], mode: str
) -> None:
    """Save the view of a sweep's runs, the best first, with their parameters, scores and curves."""
    params = [*params][:MAX_PARAMS]
    axes = {"type": "PARALLEL", "selectedParams": params, "selectedMetrics": [SCORE], "showAllRuns": True}
    lines = [{"type": "LINE", "metricKey": m, "displayName": m, "lineSmoothness": 0} for m in metrics]
    charts = [
        {"uuid": f"{SECTION}-{at}", "metricSectionId": SECTION, "deleted": False, "isGenerated": False}
        | chart
        for at, chart in enumerate([axes, *lines])
    ]
    view = {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{sweep_id}'",
        "orderByKey": f"metrics.`{SCORE}`",
        "orderByAsc": mode == "min",
        "selectedColumns": _columns(params),
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": SECTION, "name": "Sweep", "display": True, "isReordered": False}],
        "isAccordionReordered": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    client.set_experiment_tag(experiment_id, PREFIX + view_name(sweep_id), json.dumps(view))
