"""Optuna's plots of a sweep, on one page that needs no network."""

import math
import warnings
from collections.abc import Sequence

from tracklight.sweep.leaderboard import Standing
from tracklight.sweep.study import direction

LOG_RATIO = 30.0  # an axis of positive numbers this far apart is drawn logarithmically


def page(standings: Sequence[Standing], metric: str, mode: str) -> str | None:
    """Return HTML with history, importance and parallel coordinates; None with nothing to show."""
    from optuna import visualization

    from tracklight.sweep.quiet import optuna

    study = _study(standings, mode)
    num_complete = len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
    if not num_complete:
        return None
    names = list(study.best_trial.params)
    draws = [
        lambda: visualization.plot_optimization_history(study, target_name=metric),
        lambda: visualization.plot_parallel_coordinate(study, params=names, target_name=metric),
        lambda: visualization.plot_slice(study, params=names, target_name=metric),
    ]
    if num_complete > 2 and len(names) > 1:
        draws.insert(1, lambda: visualization.plot_param_importances(study, target_name=metric))
    parts = []
    for draw in draws:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                figure = draw()
            except (ValueError, RuntimeError):  # too few distinct values for this one
                continue
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts))
    return f"<html><head><meta charset='utf-8'></head><body>{''.join(parts)}</body></html>"


def _study(standings: Sequence[Standing], mode: str):
    """Build a study in memory, axes of numbers as numbers."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState

    from tracklight.sweep.quiet import optuna

    study = optuna.create_study(direction=direction(mode))
    distributions = {}
    for name in standings[0].params if standings else ():
        texts = [each.params[name] for each in standings if name in each.params]
        numbers = [_number(text) for text in texts]
        if all(number is not None and math.isfinite(number) for number in numbers):
            low, high = min(numbers), max(numbers)  # pyright: ignore[reportArgumentType]
            log = low > 0 and high / low > LOG_RATIO
            distributions[name] = FloatDistribution(low, high, log=log)
        else:
            distributions[name] = CategoricalDistribution(tuple(dict.fromkeys(texts)))
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    for each in sorted(standings, key=lambda each: each.trial):
        if (
            each.state not in states
            or each.score is None
            or each.params.keys() != distributions.keys()
        ):
            continue
        params = {
            name: text if isinstance(kind, CategoricalDistribution) else float(text)
            for (name, text), kind in zip(
                ((name, each.params[name]) for name in distributions),
                distributions.values(),
                strict=True,
            )
        }
        study.add_trial(
            optuna.create_trial(
                state=states[each.state],
                value=each.score,
                params=params,
                distributions=distributions,
            )
        )
    return study


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
