"""Tests a trained model again: on a split of its data, or on other data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracklight.reuse.command import RUN_HELP, Parser

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
    from tracklight import report
    from tracklight.errors import BadInput
    from tracklight.reuse import evaluation, stored
    from tracklight.tracking import query

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
        split = evaluation.read_rows(kept, stored.inputs_of(store, run), asked.table)
    else:
        kept = stored.rebuild(store, run, cfg, read=True)
        evaluation.check_overrides(kept, asked.overrides)
        split = evaluation.choose_split(kept, asked.split)
    if asked.into_run:
        evaluation.check_room(kept, split, asked.overrides)
    metrics = evaluation.measure(kept, split)
    lines = {"run": f"{run.info.run_id} ({run.info.run_name})"}
    if named.info.run_id != run.info.run_id:
        lines = {"sweep": f"{named.info.run_id} ({named.info.run_name})", **lines}
    lines["data"] = evaluation.said(kept, split)
    lines["score"] = report.shown({f"{split}/{name}": value for name, value in metrics.items()})
    lines |= evaluation.against_record(run, kept, split, metrics)
    if asked.into_run:
        lines["logged"] = evaluation.log_into(store, run, split, metrics)
    elif not asked.no_log:
        lines["logged"] = evaluation.log_child(store, kept, split, metrics)
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return metrics
