"""MLflow's own API during training: what a module logs with it goes to the run."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tracklight.tracking import mlflow_client
from tracklight.tracking.mlflow_client import mlflow
from tracklight.tracking.tags import PARENT_TAG


class RunStore:
    """The tracking store that MLflow's clients see in training: takes what concerns the run in progress.

    Points, params and tags go to its log, artifacts to its folder, all else to the real store. Whoever
    ends the run does not end it, and whoever starts one gets this one, unless it is to lie below another.
    """

    def __init__(self, run: Any, client: Any):
        self.run, self.real_uri = run, client.tracking_uri
        self.uri, self.real = mlflow_client.register(self, client)
        self._of_run = {
            "get_run": lambda run_id: run.entity(),
            "update_run_info": lambda run_id, run_status, end_time, run_name: (
                self.real.update_run_info(run_id, None, None, run_name) if run_name else run.entity().info
            ),
            "log_batch": self._log,
            "log_metric": lambda run_id, metric: self._log(run_id, metrics=[metric]),
            "log_param": lambda run_id, param: self._log(run_id, params=[param]),
            "set_tag": lambda run_id, tag: self._log(run_id, tags=[tag]),
        }

    def __getattr__(self, name: str) -> Any:
        real, log = getattr(self.real, name), self._of_run.get(name.removesuffix("_async"))

        def call(*args: Any, **kwargs: Any) -> Any:
            if log is None or kwargs.get("run_id", args and args[0]) != self.run.run_id:
                return real(*args, **kwargs)
            found = log(*args, **kwargs)  # a write to a file: nothing to wait for
            return mlflow_client.RunOperations(found) if name.endswith("_async") else found

        return real if log is None else call

    def create_run(self, experiment_id: str, user_id: str, start_time: int, tags: Any, run_name: str) -> Any:
        """Return this run, or a new one that lies below another."""
        if any(tag.key == PARENT_TAG for tag in tags):
            return self.real.create_run(experiment_id, user_id, start_time, tags, run_name)
        self._log(tags=[tag for tag in tags if not tag.key.startswith("mlflow.")])
        return self.run.entity()

    def _log(self, run_id: str = "", metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        for metric in metrics:
            self.run.log_value(metric.key, metric.step, metric.value)
        self.run.log_new_params({param.key: param.value for param in params})
        self.run.set_tags({tag.key: tag.value for tag in tags})


@contextlib.contextmanager
def logging_to(run: Any | None) -> Iterator[None]:
    """Let MLflow's fluent functions (`mlflow.log_metric`) and autologging log to a run; None: to nowhere."""
    of = mlflow.entities
    with tempfile.TemporaryDirectory() as folder:  # for what artifacts a module logs to nowhere
        info = of.RunInfo("0" * 32, "0", "", "RUNNING", 0, None, "active", Path(folder).as_uri())
        nowhere = mock.Mock(run_id=info.run_id, tracking_uri="")
        nowhere.entity.return_value = of.Run(info, of.RunData())
        nowhere._tracking_client.store.create_run = nowhere.entity
        store = RunStore(nowhere, nowhere) if run is None else run.store
        with mlflow_client.use_store(store, store.run.run_id):
            yield
