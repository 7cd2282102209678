"""What a sweep cannot be, in one line."""

import signal

import pytest

from commands import QUICK, Swept
from tracklight import cli

BAD = {
    "empty": ((), "nothing varies"),
    "reversed": (("optimizer.lr=interval(1,0)",), "optimizer.lr=interval(1,0) is empty"),
    "no values": (("seed=range(5,5)",), "seed=range(5,5) has no values"),
    "log of zero": (("optimizer.lr=tag(log,interval(0,1))",), "must start above 0"),
    "a corner": (("optimizer.lr=interval(-1,1)",), "optimizer.lr=-1.0 must be"),
    "a point": (("optimizer.lr=0.1,-1",), "optimizer.lr=-1 must be"),
    "sampler": (("optimizer.lr=interval(0.1,1)", "sweep.sampler=magic"), "sweep.sampler=magic"),
    "pruner": (("optimizer.lr=0.1,0.2", "sweep.pruner=axe"), "sweep.pruner=axe must be"),
    "option": (
        ("optimizer.lr=interval(0.1,1)", "sweep.sampler_options={speed: 3}"),
        "sweep.sampler_options.speed",
    ),
    "pruner's option": (
        ("optimizer.lr=0.1,0.2", "sweep.pruner=median", "sweep.pruner_options={speed: 3}"),
        "sweep.pruner_options.speed: pruner median has no such option",
    ),
    "option of no pruner": (
        ("optimizer.lr=0.1,0.2", "sweep.pruner_options={n_startup_trials: 3}"),
        "sweep.pruner_options.n_startup_trials: pruner none has no such option",
    ),
    "hyperband": (
        (
            "optimizer.lr=0.1,0.2",
            "sweep.pruner=hyperband",
            "sweep.pruner_options={min_resource: 0}",
        ),
        "sweep.pruner_options={min_resource: 0} cannot be those of pruner hyperband",
    ),
    "sampler's type": (
        ("optimizer.lr=interval(0.1,1)", "sweep.sampler_options={n_startup_trials: abc}"),
        "sweep.sampler_options={n_startup_trials: abc} cannot be those of sampler tpe",
    ),
    "two intervals": (
        ("optimizer.lr=interval(0.1,0.2),interval(0.3,0.4)",),
        "an interval or a range stands alone",
    ),
    "space": (("seed=1,2", "sweep.space=all"), "sweep.space=all must be a mapping"),
    "options": (("seed=1,2", "sweep.sampler_options=3"), "sweep.sampler_options=3 must be a map"),
    "two intervals in the space": (
        ("sweep.space={optimizer.lr: 'interval(1,2),interval(3,4)'}",),
        "optimizer.lr=interval(1,2),interval(3,4): an interval or a range stands alone",
    ),
    "whole numbers": (
        ("optimizer.lr=interval(1,2)", "data.batch_size=interval(2,4)"),
        "whole numbers alone are data.batch_size=int(interval(2,4))",
    ),
    "storage": (
        ("optimizer.lr=interval(0.1,1)", "sweep.storage=sqlite:////nowhere/at/all.db"),
        "sweep.storage=sqlite:////nowhere/at/all.db cannot be opened",
    ),
    "storage of a dry run": (
        ("seed=1,2", "sweep.storage=x", "sweep.dry_run=true"),
        "sweep.storage=x must be a database's address",
    ),
    "what is there": (("+optimizer.lr=0.1,0.2",), "optimizer.lr is there already; leave out the +"),
    "what we fill": (("sweep.space={overrides: '[a],[b]'}",), "overrides is of the command as a whole"),
    "metric": (("optimizer.lr=0.1,0.2", "score.metric=train/f1"), "score.metric=train/f1 is never"),
    "no metric": (("seed=1,2", "score.metric=null"), "score.metric=null ranks no trials; set score.metric="),
    "key": (("optimizer.rl=0.1,0.2",), "did you mean optimizer.lr"),
    "own settings": (("sweep.workers=1,2",), "sweep.workers is of the command as a whole"),
    "tracking": (("tracking.experiment=a,b",), "tracking.experiment is of the command as a whole"),
    "untracked": (
        ("seed=1,2", "tracking=none", "sweep.storage=sqlite:///study.db"),
        "sweep.storage remembers trials whose runs MLflow has",
    ),
    "function": (("optimizer.lr=intervall(0,1)",), "did you mean interval?"),
    "two scores": (("model=linear,mlp",), "scored by different metrics"),
    "a secret": (("+callbacks.u.password=S-A,S-B",), "callbacks.u.password is secret and cannot vary"),
    "a secret of a search": (("+optimizer.auth.x=S-A,S-B", "sweep.trials=2"), "optimizer.auth.x is secret"),
    "secrets within": (("+callbacks.db={password: S-A},{password: S-B}",), "callbacks.db is secret"),
    "secrets in the space": (("sweep.space={+callbacks.u.api_key: 'S-A,S-B'}",), "callbacks.u.api_key is se"),
    "a secret of a URL": (("+data.path='http://u:S-A@h','http://u:S-B@h'",), "data.path is secret"),
    "folds": (("data=table", "data.fold=0,1", "sweep.folds=3"), "sweep.folds sets data.fold"),
    "no validation": (("seed=1,2", "sweep.folds=3"), "sweep.folds ranks by validation, not by train/loss"),
    "seeds": (("seed=1,2", "sweep.seeds=3"), "seed varies already"),
    "resume": (("seed=1,2", "resume=0123abcd"), "resume=0123abcd is one run"),
    "walk": (
        ("optimizer.lr=interval(0.1,1)", "sweep.sampler=grid"),
        "cannot enumerate the interval",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_run(directory, capsys, case):
    arguments, told = BAD[case]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.delenv("HYDRA_FULL_ERROR", raising=False)  # and so it is afterwards
        cli.main(argv=["-m", *arguments, *QUICK, f"tracking.dir={directory}"])
    for number, handler in before.items():
        signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert end.value.code == 2, out + err
    assert told in err and err.count("\n") == 1
    assert err.startswith("error: ")
    assert Swept(directory).runs == []
