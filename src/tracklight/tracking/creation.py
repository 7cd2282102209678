"""Asks the store for a run, so that there is one in the end, whatever becomes of the answers."""

import time
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput
from tracklight.tracking import address, layout
from tracklight.tracking.patience import passes, persist, reason
from tracklight.tracking.quiet import mlflow

if TYPE_CHECKING:
    from tracklight.tracking.store import Store

_PAUSE_S = 1.0


def experiment_id(store: "Store", name: str) -> str:
    """The id of the experiment of this name, made if there is none.

    Raises:
        BadInput: MLflow allows no such name, or the experiment is deleted.
    """

    def get() -> Any:
        return persist(lambda: store.client.get_experiment_by_name(name), store.patience_s)

    def make() -> None:
        location = None if address.is_server(store.uri) else store.root.as_uri()
        store.client.create_experiment(name, artifact_location=location)

    experiment = get()
    if experiment is None:
        try:
            persist(make, store.patience_s)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise BadInput(f"tracking.experiment={name}: {reason(error)}") from None
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # then another was faster
                raise
        experiment = get()
    if experiment is None or experiment.lifecycle_stage != "active":
        raise BadInput(f"tracking.experiment={name} is deleted; restore it, or try another name")
    return experiment.experiment_id


def create_once(store: "Store", experiment_id: str, name: str | None, tags: dict[str, str]) -> Any:
    """MLflow's run, made by one request or by the first of several; its key tag tells them apart.

    Raises:
        MlflowException: The store does not take it, or has been away for too long.
    """
    query = f"tags.`{layout.KEY_TAG}` = '{tags[layout.KEY_TAG]}'"
    start_s = time.monotonic()
    run = None
    while run is None:
        try:
            run = store.client.create_run(experiment_id, tags=tags, run_name=name)
        except mlflow.exceptions.MlflowException as error:
            if not passes(error) or time.monotonic() - start_s > store.patience_s:
                raise
            time.sleep(_PAUSE_S)
            run = next(iter(store.search(query)), None)  # was only the answer lost?
    if address.is_server(store.uri):  # MLflow's own retries send the request again, unasked
        for other in store.search(query):
            if other.info.run_id != run.info.run_id:
                store.client.delete_run(other.info.run_id)
    return run
