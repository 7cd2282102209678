"""What a run records: its description at the start, its score and status at the end."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import yaml
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from tracklight.config import compose
from tracklight.data.tensor_data import TensorData
from tracklight.engine.blocks import NonFinite
from tracklight.engine.signals import Stopped
from tracklight.errors import BadInput, RunFailed, count
from tracklight.experiment.build import OPTIMIZER_KEYS
from tracklight.experiment.stored import COMMAND_KEYS, ResumedRun, describe_inputs
from tracklight.figures.choose import FOLDER, draw_figures
from tracklight.models.linear_regression import LinearRegression
from tracklight.redact import redact
from tracklight.runs.reader import finite
from tracklight.runs.select import read_text
from tracklight.tracking import tags
from tracklight.tracking.logged_model import log_model
from tracklight.tracking.provenance import CODE_FILES, Provenance
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

MAX_NAMED = 5  # files of code that a refusal names


@dataclass(frozen=True)
class Recorder:
    """Writes down in a run what it is and what it came to."""

    cfg: Mapping[str, Any]  # resolved, plain values
    model: LightningModule
    data: LightningDataModule | None
    provenance: Provenance

    def open_run(self, store: Store, resumed: ResumedRun | None, further_tags: Mapping[str, str]) -> Run:
        """Create a run or reopen the resumed one, and set the tags that identify it.

        Raises:
            BadInput: The resumed run was started with other code, data or settings.
        """
        cfg, model, data, tracking = self.cfg, self.model, self.data, self.cfg["tracking"]
        named = getattr(data, "name", None)  # which in a foreign class may be anything
        data_name = named if isinstance(named, str) and named else type(data).__name__
        source_digest = data.source_digest if isinstance(data, TensorData) else None
        run_tags = {
            **tags.own_tags(compose.flatten(tracking["tags"]), redact(tracking["note"])),
            **self.provenance.tags,
            tags.IDENTITY_TAG: compose.config_digest(cfg),
            tags.SETTING_TAG: compose.digest_without_seed(cfg, source_digest),
            tags.DATA_TAG: data.digest if isinstance(data, TensorData) else "unknown",
            **({} if source_digest is None else {tags.DATA_SET_TAG: source_digest}),
            tags.DATA_NAME_TAG: data_name,
            tags.EPOCHS_TAG: str(cfg["trainer"]["max_epochs"]),
            **further_tags,
        }
        if resumed is None:
            # MLflow's own random names repeat with the seed.
            names = [type(model).__name__, *([] if data is None else [data_name])]
            name = tracking["run_name"] or "-".join([*names, time.strftime("%m%d-%H%M%S")])
            return store.create(tracking["experiment"], name, run_tags)
        run_id, changes = resumed.run.info.run_id, list(resumed.changes)
        for tag in (tags.CODE_TAG, tags.DATA_TAG):
            before, now = resumed.run.data.tags.get(tag, run_tags[tag]), run_tags[tag]
            if before != now:
                where = self._differing_files(store, resumed.run) if tag == tags.CODE_TAG else ""
                changes.append(f"{tag.partition('.')[2]}: digest {before[:12]} -> {now[:12]}{where}")
        if changes and not cfg["allow_changes"]:
            how = "add allow_changes=true to continue all the same, which is recorded"
            raise BadInput(f"run {run_id} was started otherwise ({'; '.join(changes)}); {how}")
        if changes:
            run_tags[tags.CHANGES_TAG] = "; ".join(changes)
        run = store.reopen(run_id)
        run.set_tags(run_tags)
        return run

    def _differing_files(self, store: Store, run: Any) -> str:
        """Name the files of code that are not as the run had them; none if it did not record its files."""
        with suppress(BadInput):
            found = {*read_text(store, run, CODE_FILES).splitlines()}
            found ^= {*self.provenance.texts[CODE_FILES].splitlines()}
            names = sorted({line.partition("  ")[2] for line in found})
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            return f" in {', '.join(names[:MAX_NAMED])}{more}" if names else ""
        return ""

    def describe(self, run: Run) -> None:
        """Log the run's params, data set, config and provenance."""
        tree, data = redact(self.cfg), self.data
        if not run.params:  # as are all resumed runs but those killed right after their creation
            if isinstance(data, TensorData):
                run.log_input(data.name, data.digest, data.source, "training")
            # What does not describe the training is no param, or every comparison would show it.
            own = () if hasattr(self.model, "optimizer_factory") else OPTIMIZER_KEYS
            params = {k: v for k, v in tree.items() if k not in (*COMMAND_KEYS, "overrides", *own)}
            flat = compose.flatten_redacted(params)
            run.log_params(compose.short_params(flat) | flat)  # last: params say that it is described
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        run.log_text(yaml.dump(tree, Dumper=dumper, sort_keys=False), tags.CONFIG)
        if isinstance(data, TensorData):
            run.log_text(json.dumps(describe_inputs(data), indent=1) + "\n", tags.INPUTS)
        for path, text in self.provenance.texts.items():
            run.log_text(text, path)
        run.upload_artifacts()  # so that a run whose process dies can be rebuilt from its store, too

    def log_reference(self, run: Run) -> dict[str, float]:
        """Log and return how far a trained linear regression is from the least-squares solution."""
        model, data = self.model, self.data
        if not (isinstance(model, LinearRegression) and isinstance(data, TensorData)):
            return {}
        train = data.splits["train"]
        metrics = model.reference(data.transform(train.features), train.targets)
        run.log_metrics(metrics)
        return metrics

    def log_final(
        self, store: Store, run: Run, step: int, score: float | None, tested: bool, inputs: Tensor | None
    ) -> None:
        """Log the score, the figures and the model of a run that ends well.

        The model has its best weights, those of optimizer step `step`. Trials of a sweep are not tested
        and log no model. `inputs` are an example of a foreign data set's.
        """
        model, data = self.model, self.data
        if score is not None:
            run.log_series(tags.SCORE, (step,), (score,))
        if self.cfg["tracking"]["figures"]:
            draw_figures(model, data, run.logged_metrics(), run.artifacts / FOLDER, step, tested)
        if not tested:
            return
        names, takes = (), ""
        if isinstance(data, TensorData):
            inputs, takes = data.transform(data.splits["train"].features[:2]), data.encoding
            columns, targets = data.feature_names, describe_inputs(data).get("target_names", ())
            names = (columns, targets) if columns and len(targets) == data.out_features else ()
        elif isinstance(model.example_input_array, Tensor):  # what Lightning's own exports take
            inputs = model.example_input_array
        log_model(store.client, run.run_id, model, inputs, step, takes, *names)

    def summarise(
        self, run: Run | None, score: float | None, step: int, metrics: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a run came to, for programs; a tracked run keeps it beside its config."""
        summary: dict[str, Any] = {
            "metric": self.cfg["score"]["metric"],
            "mode": self.cfg["score"]["mode"],
            "score": score,
            "step": step,
            "metrics": {key: finite(float(value)) for key, value in metrics.items()},
        }
        if run is not None:
            summary = {"id": run.run_id, "name": run.name, **summary, "folder": str(run.artifacts)}
            run.log_text(json.dumps(summary, indent=1) + "\n", tags.SUMMARY)
        return summary


@contextmanager
def finish_run(
    run: Run | None, model: LightningModule, trainer: Trainer | None, figures: bool
) -> Iterator[None]:
    """Finish the run, if there is one, with the status in which the block really ends."""
    if run is None:
        yield
        return
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    except BadInput as error:  # that this run failed is in its record
        raise RunFailed(str(error)) from error
    except NonFinite as error:
        run.set_tags({tags.NON_FINITE_TAG: str(error.step)})
        raise
    finally:
        if status == "FAILED" and figures:  # its learning curves often show why
            with suppress(OSError):  # as may a full disk
                series = run.logged_metrics()
                if any(len(steps) > 1 for steps, _ in series.values()):
                    draw_figures(model, None, series, run.artifacts / FOLDER)
        run.finish(status)
        if status == "KILLED" and trainer is not None:
            epoch = f"{trainer.current_epoch} of {count(trainer.max_epochs or 0, 'epoch')} done"
            print(f"stopped, {epoch}: run {run.run_id} ({run.name}); resume={run.run_id} continues it")
