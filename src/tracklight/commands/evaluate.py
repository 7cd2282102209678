"""Tests a trained model again: on a split of its data, or on other data."""

import logging
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers.logger import DummyLogger

from tracklight.config.compose import list_targets
from tracklight.config.overrides import redact_command
from tracklight.data import csv_columns, table
from tracklight.data.tensor_data import Split, TensorData
from tracklight.engine import distributed, progress, seeding
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment import build, record, stored
from tracklight.runs.select import resolve_sweep, select_run
from tracklight.tracking import mlflow_api, provenance, tags
from tracklight.tracking.mlflow_client import mlflow, retry, short_reason
from tracklight.tracking.run import to_key
from tracklight.tracking.store import Store

ROWS = "rows"  # the split that holds all rows of --table
INTO_RUN_KEY = "evaluate/{}_{}"  # of a split and a metric's name
LOCATION_KEYS = ("data.root", "data.path", "data.download", "data.fallback", "data.batch_size")


def run(args: Namespace) -> int:
    """Test the model of a run, log the metrics and print them; return the exit code."""
    wrong = [word for word in args.overrides if not word.startswith("data.")]
    if wrong:
        raise BadInput(f"{wrong[0]}: only the data can be changed, data.KEY=VALUE")
    if args.table is not None and args.split is not None:
        raise BadInput(f"--split {args.split}: every row of --table is tested; leave one out")
    store = stored.open_store(args.uri, args.dir)
    selected = select_run(store, args.run, args.experiment)
    trained = resolve_sweep(store, selected)
    cfg = stored.load_config(store, trained, [*stored.ANY_HARDWARE, *args.overrides])
    rebuilt = stored.rebuild(store, trained, cfg, read=args.table is None, load=False)
    if args.table is None:
        _check_overrides(rebuilt, args.overrides)
        split = _choose_split(rebuilt, args.split)
    else:
        split = _read_rows(rebuilt, stored.load_inputs(store, trained), args.table)
    if args.into_run:
        if store.why_read_only:
            raise BadInput(f"--into-run: {store.why_read_only}; leave it out")
        _check_into_run(rebuilt, split, args.overrides)
    scores = measure(rebuilt, split)
    lines = {}
    if selected.info.run_id != trained.info.run_id:
        lines["sweep"] = f"{selected.info.run_id} ({selected.info.run_name})"
    lines["run"] = f"{trained.info.run_id} ({trained.info.run_name})"
    lines["data"] = f"{split} of {type(rebuilt.data).__name__}"
    if isinstance(rebuilt.data, TensorData):
        lines["data"] = f"{split} of {rebuilt.data.name}, {len(rebuilt.data.splits[split]):,} examples"
    lines["score"] = progress.format_metrics(scores)
    if split == "test":
        lines |= _compare_with_recorded(rebuilt, scores)
    if store.why_read_only:
        lines["logged"] = f"nothing: {store.why_read_only}"
    elif not args.no_log:
        lines["logged"] = _log(store, rebuilt, split, scores, args.into_run)
    args.emit({**lines, "run": trained.info.run_id, "split": split, "score": scores})
    print(progress.align_lines(lines))
    return 0


def _choose_split(rebuilt: stored.RebuiltRun, wanted: str | None) -> str:
    """Return the split to test on: the wanted one, else the test part, else the last one."""
    if not isinstance(rebuilt.data, TensorData):
        if wanted == "train":
            raise BadInput("--split train needs a tracklight data set (TensorData)")
        if wanted != "val" and not build.has_test(rebuilt.model, rebuilt.data):
            name = type(rebuilt.model).__name__
            raise BadInput(f"{name} has no test_step, or its data no test_dataloader; try --split val")
        return wanted or "test"
    available = list(rebuilt.data.splits)
    if wanted is not None and wanted not in available:
        data = f"{rebuilt.data.name}, on which run {rebuilt.run.info.run_id} was trained"
        raise BadInput(f"--split {wanted}: {data}, has only {', '.join(available)}")
    return wanted or available[-1]


def _check_overrides(rebuilt: stored.RebuiltRun, overrides: Sequence[str]) -> None:
    """Refuse overrides that prepare or split one of our data sets otherwise than for training."""
    if not isinstance(rebuilt.data, TensorData):  # what its keys mean is unknown
        return
    words = {word.partition("=")[0].lstrip("+~"): word for word in overrides}
    for key, word in words.items():
        if key not in LOCATION_KEYS:
            allowed = f"what can be changed is {', '.join(LOCATION_KEYS)}"
            raise BadInput(f"{word} would prepare or split the data otherwise than for training; {allowed}")
    if (word := words.get("data.path")) and not _is_own_data(rebuilt):
        instead = f"--table {word.partition('=')[2]} tests all of them, standardised as in training"
        raise BadInput(f"{word} holds other rows than the run's; {instead}")


def _read_rows(rebuilt: stored.RebuiltRun, inputs: dict[str, Any], path: Path) -> str:
    """Read every row of a table, encoded as in training, as the only split; return its name."""
    if not isinstance(rebuilt.data, table.Table):
        raise BadInput(f"--table {path}: the run was not trained on a table; use data.KEY=VALUE")
    names, targets = inputs["feature_names"], inputs["target_names"]
    values = csv_columns.read_features(path, [*names, *targets], rebuilt.data.delimiter, rebuilt.data.decimal)
    features = rebuilt.data.encode(values[:, : len(names)])
    rebuilt.data.splits = {ROWS: Split(features, features.new_tensor(values[:, len(names) :]))}
    rebuilt.data.name, rebuilt.data.source = path.name, str(path.absolute())
    return ROWS


def measure(rebuilt: stored.RebuiltRun, split: str) -> dict[str, float]:
    """Return the metrics of the model on a split, computed and named as the run's own test does."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    asked, environment = rebuilt.cfg.trainer, distributed.cluster_environment()
    off: Any = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    where: Any = {"accelerator": asked.accelerator, "devices": 1, "precision": asked.precision}
    trainer = Trainer(plugins=environment, logger=DummyLogger(), **where, **off)
    stage, evaluate = "test", trainer.test
    if isinstance(rebuilt.data, TensorData):
        _ = rebuilt.data.digest  # of the splits as they were read
        rebuilt.data.splits = {**rebuilt.data.splits, "test": rebuilt.data.splits[split]}
    elif split == "val":
        stage, evaluate = "val", trainer.validate
    with mlflow_api.logging_to(None), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*add the following callbacks")  # their weights are all it needs
        seeding.seed_all(rebuilt.cfg.seed, seeding.SETUPS, 0)
        results = evaluate(rebuilt.model, rebuilt.data, ckpt_path=rebuilt.checkpoint, verbose=False)
    return {
        name if split == stage else f"{split}/{name.removeprefix(f'{stage}/')}": value
        for result in results
        for name, value in result.items()
    }


def _compare_with_recorded(rebuilt: stored.RebuiltRun, scores: dict[str, float]) -> dict[str, str]:
    """Describe whether the run's own test had the same metrics, if it recorded any."""
    recorded = rebuilt.run.data.metrics
    gaps = [abs(value - recorded[to_key(key)]) for key, value in scores.items() if to_key(key) in recorded]
    if not gaps:
        return {}
    lines = {"note": "the same to the bit as recorded by the run"}
    if not _is_own_data(rebuilt):
        lines = {"note": "this is not the data that the run was tested on"}
    elif any(gaps):
        lines = {"note": f"up to {max(gaps):.2g} from what the run recorded"}
    code = provenance.code_digest(list_targets(rebuilt.cfg))
    if code != rebuilt.run.data.tags.get(tags.CODE_TAG, code):
        lines["code"] = "differs from the code that trained the run"
    return lines


def _check_into_run(rebuilt: stored.RebuiltRun, split: str, overrides: Sequence[str]) -> None:
    """Refuse to log to a run in progress, or metrics of other data or that it already has."""
    run_id, metrics = rebuilt.run.info.run_id, rebuilt.run.data.metrics
    instead = "leave --into-run out to log to a child of it"
    if not _is_own_data(rebuilt) or (overrides and not isinstance(rebuilt.data, TensorData)):
        raise BadInput(f"--into-run: this is not the run's own data; {instead}, which names its data")
    if rebuilt.run.info.status == "RUNNING":
        raise BadInput(f"--into-run: run {run_id} is RUNNING; leave --into-run out")
    prefix = INTO_RUN_KEY.format(split, "")
    logged = [f"{key} {metrics[key]:.6g}" for key in sorted(metrics) if key.startswith(prefix)]
    if logged:
        raise BadInput(f"--into-run: run {run_id} has {', '.join(logged)} already; {instead}")


def _log(
    store: Store, rebuilt: stored.RebuiltRun, split: str, scores: dict[str, float], into_run: bool
) -> str:
    """Log metrics to the run, whose status stays as it is, or to a new child; describe where."""
    run, run_id = rebuilt.run, rebuilt.run.info.run_id
    step = max((each.step for each in store.client.get_metric_history(run_id, tags.SCORE)), default=0)
    if into_run:
        now_ms, metric = time.time_ns() // 1_000_000, mlflow.entities.Metric
        names = [to_key(INTO_RUN_KEY.format(split, key.removeprefix(f"{split}/"))) for key in scores]
        points = [metric(*each, now_ms, step) for each in zip(names, scores.values(), strict=True)]
        try:
            retry(lambda: store.client.log_batch(run_id, points), store.timeout_s)
        except mlflow.exceptions.MlflowException as error:
            raise RunFailed(f"cannot log to run {run_id}: {short_reason(error)}") from None
        return f"to the run, as {INTO_RUN_KEY.format(split, '*')}"
    child_tags = {
        tags.PARENT_TAG: run_id,
        tags.EVALUATES_TAG: run_id,
        tags.DATA_TAG: _data_digest(rebuilt),
        tags.CODE_TAG: provenance.code_digest(list_targets(rebuilt.cfg)),
        tags.COMMAND_TAG: redact_command(sys.argv),
    }
    experiment = store.client.get_experiment(run.info.experiment_id).name
    child = store.create(experiment, f"evaluate-{split}", child_tags)
    with record.finish_run(child, rebuilt.model, None, figures=False):
        for name, value in scores.items():
            child.log_value(name, step, value)
        if isinstance(data := rebuilt.data, TensorData):
            child.log_input(data.name, data.digest, data.source, split)
    return f"to {child.run_id}, a child of the run"


def _data_digest(rebuilt: stored.RebuiltRun) -> str:
    return rebuilt.data.digest if isinstance(rebuilt.data, TensorData) else "unknown"


def _is_own_data(rebuilt: stored.RebuiltRun) -> bool:
    return rebuilt.run.data.tags.get(tags.DATA_TAG) in (None, _data_digest(rebuilt))
