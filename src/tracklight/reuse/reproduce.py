"""Trains a run again by its stored config and says whether the same came out."""

from collections.abc import Sequence
from typing import Any

from tracklight.reuse.command import RUN_HELP, Parser

EPILOG = """\
Nothing is checked out and nothing is installed: differences of code, packages, machine and data are
told, and the run is made again as a new run beside the old one. KEY=VALUE may change what no result
depends on, such as data.root or trainer.enable_progress_bar, and trainer.accelerator or
trainer.devices where this machine has not those of the run. A sweep stands for its best trial; a
trial that was pruned ends after as many epochs again.
Exit codes: 0 identical to the bit, 1 not, 2 bad input."""


ELSEWHERE = ("trainer.accelerator:", "trainer.devices:")  # what another machine may force


def main(argv: Sequence[str]) -> int:
    """Reproduce as the command line says; return the exit code."""
    parser = Parser("Train a run again and compare metrics and final weights.", EPILOG)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the stored config")
    return reproduce(parser.parse_intermixed_args(argv))


def reproduce(asked: Any) -> int:
    """Train again, compare, and print what was found; return the exit code.

    Raises:
        BadInput: The run is not to be had, did not finish, or an override would change its result.
    """
    from tracklight import experiment
    from tracklight.errors import BadInput, RunFailed
    from tracklight.reuse import likeness, stored
    from tracklight.sweep.trial import EPOCHS_RUN_TAG, POINT_TAG, TESTED_TAG
    from tracklight.tracking import query
    from tracklight.tracking.layout import REPRODUCES_TAG, is_pruned

    store = stored.open_store(asked.uri, asked.dir)
    run = query.trained(store, query.choose(store, asked.run, asked.experiment))
    if run.info.status != "FINISHED":
        raise BadInput(
            f"run {run.info.run_id} is {run.info.status}; only a FINISHED run has an end to compare"
        )
    query.fetch(store, run, query.LAST)  # without weights there is nothing to compare with
    cfg = stored.stored_config(store, run, asked.overrides)
    changed = _changes(stored.stored_config(store, run), cfg)
    refused = [line for line in changed if not line.startswith(ELSEWHERE)]
    if refused:
        raise BadInput(f"{refused[0]} changes the result; that is a new run: use train.py")
    cfg.tracking.experiment = store.client.get_experiment(run.info.experiment_id).name
    name = (run.info.run_name or "").removeprefix("reproduce-")
    cfg.tracking.run_name = f"reproduce-{name}"[:250]
    reasons = [f"config: {line}" for line in changed] + likeness.reasons(store, run, cfg)
    reasons += likeness.data_reasons(run, cfg)
    tags = run.data.tags
    pruner = [_pruner(run, cfg)] if is_pruned(tags) else []
    ended = f", pruned by its sweep after epoch {tags[EPOCHS_RUN_TAG]}" if pruner else ""
    print(f"reproducing {run.info.run_id} ({run.info.run_name}){ended}")
    for reason in reasons:
        print(f"warning: {reason}")
    tested = POINT_TAG not in tags or TESTED_TAG in tags  # a sweep tests but one trial
    experiment.run(cfg, tags={REPRODUCES_TAG: run.info.run_id}, callbacks=pruner, test=tested)
    made = store.search(f"tags.`{REPRODUCES_TAG}` = '{run.info.run_id}'")
    if not made:
        raise RunFailed(f"the new run is not in {store.shown_uri}")
    found = likeness.compare(store, run, made[0])
    print(f"\n{found.said()}")
    if not found.identical:
        for line in likeness.explained(reasons, cfg):
            print(f"  why: {line}")
    return 0 if found.identical else 1


def _changes(stored: Any, cfg: Any) -> list[str]:
    """Tell where overrides change what the result depends on."""
    from tracklight import config

    trained_by = [
        config.deciding(each) | {"trainer.max_epochs": each.trainer.max_epochs}
        for each in (stored, cfg)
    ]
    return config.differences(*trained_by)


def _pruner(run: Any, cfg: Any) -> Any:
    """Return the callback that ends the training where a sweep ended that of a run.

    The number of epochs asked for stays as it was: schedules may depend on it.
    """
    from tracklight.sweep.reporting import Reporter
    from tracklight.sweep.trial import EPOCHS_RUN_TAG

    epochs = int(run.data.tags[EPOCHS_RUN_TAG])
    return Reporter(cfg.score.metric, lambda epoch, _: epoch.number >= epochs, asks=True)
