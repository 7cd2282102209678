"""Tests a trained model again: on a split of its data, or on other data."""

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from tracklight.commands.parser import RUN_HELP, Parser
from tracklight.config import compose as config
from tracklight.data.csv_columns import read_features
from tracklight.data.table import Table
from tracklight.data.tensor_data import Split, TensorData
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.build import has_test
from tracklight.experiment.stored import Stored
from tracklight.redact import redact
from tracklight.tracking import provenance
from tracklight.tracking.mlflow_client import mlflow, reason, retry
from tracklight.tracking.run import check_key
from tracklight.tracking.store import Store
from tracklight.tracking.tags import CODE_TAG, DATA_TAG, EVALUATES_TAG, PARENT_TAG

EPILOG = """\
KEY=VALUE says where the data lie now, or other data of the same kind:
  evaluate.py best data.root=/other/mnist       the test part of other IDX files
  evaluate.py RUN --table new.csv               every row of a CSV file with the same columns,
                                                standardised as in training
A sweep stands for its best trial. The metrics go to a child of the run; with --into-run to the run
itself, as evaluate/SPLIT_NAME, once a split.
Exit codes: 0 done, 1 failed, 2 bad input."""


def main(argv: Sequence[str]) -> int:
    """Evaluate as the command line says; return the exit code."""
    parser = Parser("Test the best weights of a run again.", EPILOG)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of data")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="default: test, where there is one"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="test on all rows of this CSV")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--into-run", action="store_true", help="log to the run, not to a child")
    where.add_argument("--no-log", action="store_true", help="log nothing")
    asked = parser.parse_intermixed_args(argv)
    evaluate(asked)
    return 0


def evaluate(asked: Any) -> dict[str, float]:
    """Test, log and print what `asked` says; return the metrics by their name.

    Raises:
        BadInput: The run, its files, the split or the data are not there, or it has such metrics.
    """
    from tracklight.engine import progress as report
    from tracklight.errors import BadInput
    from tracklight.experiment import stored
    from tracklight.runs import select as query

    wrong = [each for each in asked.overrides if not each.startswith("data.")]
    if wrong:
        raise BadInput(f"{wrong[0]}: only the data can be changed, data.KEY=VALUE")
    if asked.table is not None and asked.split is not None:
        raise BadInput(f"--split {asked.split}: every row of --table is tested; leave one out")
    store = stored.open_store(asked.uri, asked.dir)
    named = query.choose(store, asked.run, asked.experiment)
    run = query.trained(store, named)
    cfg = stored.stored_config(store, run, [*stored.ANYWHERE, *asked.overrides])
    if asked.table is not None:
        kept = stored.rebuild(store, run, cfg, read=False)
        split = read_rows(kept, stored.inputs_of(store, run), asked.table)
    else:
        kept = stored.rebuild(store, run, cfg, read=True)
        check_overrides(kept, asked.overrides)
        split = choose_split(kept, asked.split)
    if asked.into_run:
        check_room(kept, split, asked.overrides)
    metrics = measure(kept, split)
    lines = {"run": f"{run.info.run_id} ({run.info.run_name})"}
    if named.info.run_id != run.info.run_id:
        lines = {"sweep": f"{named.info.run_id} ({named.info.run_name})", **lines}
    lines["data"] = said(kept, split)
    lines["score"] = report.shown({f"{split}/{name}": value for name, value in metrics.items()})
    lines |= against_record(run, kept, split, metrics)
    if asked.into_run:
        lines["logged"] = log_into(store, run, split, metrics)
    elif not asked.no_log:
        lines["logged"] = log_child(store, kept, split, metrics)
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return metrics


ROWS = "rows"  # the split that a table of its own is
PLACES = ("data.root", "data.path", "data.download", "data.fallback", "data.batch_size")


def choose_split(kept: Stored, wanted: str | None) -> str:
    """Return which split to test on: the wanted one, else the test part, else the last there is.

    Raises:
        BadInput: There is no such split.
    """
    if not isinstance(kept.data, TensorData):
        if wanted == "train":
            raise BadInput("--split train needs a tracklight data set (TensorData)")
        if wanted != "val" and not has_test(kept.model, kept.data):
            raise BadInput(
                f"{type(kept.model).__name__} has no test_step, or its data no test_dataloader; "
                "try --split val"
            )
        return wanted or "test"
    there = list(kept.data.splits)
    if wanted is not None and wanted not in there:
        raise BadInput(
            f"--split {wanted}: {kept.data.name}, on which run {kept.run.info.run_id} was trained, "
            f"has only {', '.join(there)}"
        )
    return wanted or there[-1]


def check_overrides(kept: Stored, overrides: Sequence[str]) -> None:
    """Refuse to prepare or to split a data set of ours otherwise than for training.

    Raises:
        BadInput: A part would hold examples of the training part, or be encoded otherwise.
    """
    if not isinstance(kept.data, TensorData):  # what its keys mean is not known
        return
    keys = {word.partition("=")[0].lstrip("+~"): word for word in overrides}
    for key, word in keys.items():
        if key not in PLACES:
            raise BadInput(
                f"{word} would prepare or split the data otherwise than for training; what can be "
                f"changed is {', '.join(PLACES)}"
            )
    if "data.path" in keys and not _is_own(kept):
        raise BadInput(
            f"{keys['data.path']} holds other rows than the run's; --table "
            f"{keys['data.path'].partition('=')[2]} tests all of them, standardised as in training"
        )


def read_rows(kept: Stored, facts: dict[str, Any], path: Path) -> str:
    """Read every row of a table, encoded as in training, as the one split there is.

    Raises:
        BadInput: The run's data is no table, or the file does not hold its columns.
    """
    if not isinstance(kept.data, Table):
        raise BadInput(f"--table {path}: the run was not trained on a table; use data.KEY=VALUE")
    names, targets = facts["feature_names"], facts["target_names"]
    values = read_features(path, [*names, *targets], kept.data.delimiter)
    features = kept.data.encode(values[:, : len(names)])
    kept.data.splits = {ROWS: Split(features, features.new_tensor(values[:, len(names) :]))}
    kept.data.name, kept.data.source = path.name, str(path.absolute())
    return ROWS


def measure(kept: Stored, split: str) -> dict[str, float]:
    """Return the metrics of the model on a split, by the arithmetic of the run's own test."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = kept.cfg.trainer
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if isinstance(kept.data, TensorData):
        _ = kept.data.digest  # of the splits as they were read
        kept.data.splits = {**kept.data.splits, "test": kept.data.splits[split]}
    stage = "val" if split == "val" and not isinstance(kept.data, TensorData) else "test"
    walk = trainer.validate if stage == "val" else trainer.test
    found = walk(kept.model, datamodule=kept.data, verbose=False)
    metrics: dict[str, float] = {}
    for each in found:
        metrics |= {name.removeprefix(f"{stage}/"): float(value) for name, value in each.items()}
    return metrics


def said(kept: Stored, split: str) -> str:
    """Tell the examples in a few words."""
    if not isinstance(kept.data, TensorData):
        return f"{split} of {type(kept.data).__name__}"
    return f"{split} of {kept.data.name}, {len(kept.data.splits[split]):,} examples"


def against_record(run: Any, kept: Stored, split: str, metrics: dict[str, float]) -> dict[str, str]:
    """Say whether the run's own test gave the same, where that can be told."""
    recorded = {
        name: run.data.metrics[f"test/{name}"]
        for name in metrics
        if f"test/{name}" in run.data.metrics
    }
    if split != "test" or not recorded or kept.data is None:
        return {}
    lines = {}
    if not _is_own(kept):
        lines["note"] = "this is not the data that the run was tested on"
    elif all(metrics[name] == value for name, value in recorded.items()):
        lines["note"] = "the same to the bit as recorded by the run"
    else:
        far = max(abs(metrics[name] - value) for name, value in recorded.items())
        lines["note"] = f"up to {far:.2g} from what the run recorded"
    code = provenance.code_digest(config.targets(kept.cfg))
    if code != run.data.tags.get(CODE_TAG, code):
        lines["code"] = "differs from the code that trained the run"
    return lines


def check_room(kept: Stored, split: str, overrides: Sequence[str]) -> None:
    """Refuse to log to a run what could not be told from what it has.

    Raises:
        BadInput: The run is in progress, has metrics of this split already, or other data.
    """
    run = kept.run
    is_ours = isinstance(kept.data, TensorData)
    if not _is_own(kept) or (overrides and not is_ours):
        raise BadInput(
            "--into-run: this is not the run's own data; leave --into-run out to log to a child of"
            " it, which names its data"
        )
    if run.info.status == "RUNNING":
        raise BadInput(f"--into-run: run {run.info.run_id} is RUNNING; leave --into-run out")
    there = [
        f"{key} {value:.6g}"
        for key, value in sorted(run.data.metrics.items())
        if key.startswith(_key(split, ""))
    ]
    if there:
        raise BadInput(
            f"--into-run: run {run.info.run_id} has {', '.join(there)} already; "
            "leave --into-run out to log to a child of it"
        )


def log_into(store: Store, run: Any, split: str, metrics: dict[str, float]) -> str:
    """Log metrics to a run that has ended, whose status and end stay as they are; say where.

    Raises:
        RunFailed: MLflow does not take them.
    """
    now_ms, step = time.time_ns() // 1_000_000, _step(run)
    points = [
        mlflow.entities.Metric(_key(split, name), value, now_ms, step)
        for name, value in metrics.items()
    ]
    try:
        retry(lambda: store.client.log_batch(run.info.run_id, points), store.patience_s)
    except mlflow.exceptions.MlflowException as error:
        raise RunFailed(f"cannot log to run {run.info.run_id}: {reason(error)}") from None
    return f"to the run, as {_key(split, '*')}"


def log_child(store: Store, kept: Stored, split: str, metrics: dict[str, float]) -> str:
    """Log metrics to a new child of the run; say where.

    Raises:
        BadInput: MLflow allows no metric of such a name; no child was made.
    """
    run, step = kept.run, _step(kept.run)
    experiment = store.client.get_experiment(run.info.experiment_id).name
    tags = {
        PARENT_TAG: run.info.run_id,
        EVALUATES_TAG: run.info.run_id,
        DATA_TAG: _digest(kept),
        CODE_TAG: provenance.code_digest(config.targets(kept.cfg)),
        "tracklight.command": redact(shlex.join(sys.argv)),
    }
    for name in metrics:
        check_key("metric", f"{split}/{name}")
    tracked = store.create(experiment, f"evaluate-{split}", tags)
    status = "FAILED"
    try:
        for name, value in metrics.items():
            tracked.log_series(f"{split}/{name}", (step,), (value,))
        if isinstance(kept.data, TensorData):
            tracked.log_input(kept.data.name, tags[DATA_TAG], kept.data.source, split)
        status = "FINISHED"
    finally:
        tracked.finish(status)
    return f"to {tracked.run_id}, a child of the run"


def _key(split: str, name: str) -> str:
    return f"evaluate/{split}_{name}"


def _is_own(kept: Stored) -> bool:
    """Say whether the data have the digest of those that the run was trained on."""
    digest = _digest(kept)
    return digest == kept.run.data.tags.get(DATA_TAG, digest)


def _digest(kept: Stored) -> str:
    if not isinstance(kept.data, TensorData):
        return "unknown"
    return kept.data.digest


def _step(run: Any) -> int:
    steps = [m.step for m in run.data._metric_objs if m.key == "score"]  # noqa: SLF001
    return max(steps, default=0)
