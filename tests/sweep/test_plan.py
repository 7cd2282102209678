"""The configs of a sweep's runs, made from copies, against what Hydra composes for each alone."""

import signal

import pytest

from tracklight import cli
from tracklight.config.compose import compose, config_digest, to_plain
from tracklight.sweep import sweeper
from tracklight.sweep.plan import Plan, make_trial_spec, with_num_threads

GRIDS = {
    "seeds, which another key follows": ["seed=range(0,4)"],
    "numbers, text, null and lists": [
        *("model=mlp", "optimizer=adamw", "optimizer.betas=[0,0.9],[0.5,0.99]", "model.hidden=[8],[8,8],[]"),
        *("trainer.gradient_clip_val=null,1,0.5", "trainer.precision=32,64", "scheduler=onecycle"),
    ],
    "equal numbers, which the digest tells not apart": [
        "optimizer.lr=1,1.0,1e-1",
        "optimizer.momentum=0,0.0",
    ],
    "a key that others refer to": [
        "scheduler=onecycle",
        "optimizer.lr=0.1,0.2",
    ],
    "groups": [
        "scheduler=none,cosine",
        "optimizer=sgd,adam",
        "optimizer.lr=0.1,0.2",
        "callbacks=none,early_stopping",
    ],
    "a preset": ["experiment=debug,seed_linear", "optimizer.lr=0.1,0.2"],
    "added keys": ["+model.extra=true,1,1.0", "+tracking.tags.mine=${seed}", "seed=1,2"],
    "several seeds": ["optimizer.lr=0.1,0.2", "sweep.seeds=3", "seed=5"],
    "several folds": ["model=mlp", "optimizer.lr=0.1,0.2", "sweep.folds=2", "data=table"],
}


@pytest.fixture
def plan(monkeypatch):
    """Return the plan of a sweep, given its overrides."""

    def make(words):
        plans = []
        monkeypatch.setattr(sweeper, "sweep", lambda *command: plans.append(Plan(*command)))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        cli.main(argv=["-m", *words])
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return plans[0]

    return make


@pytest.mark.parametrize("grid", GRIDS)
def test_each_config_is_what_hydra_composes_for_it_alone(plan, grid):
    found = plan(GRIDS[grid])
    jobs = [job for jobs in found.configs for job in jobs]
    assert len({job.key for job in jobs}) == len(jobs) > 1
    for job in jobs:
        alone = compose(job.overrides)
        assert repr(job.cfg) == repr(to_plain(alone))  # 1, 1.0 and True are equal
        with_threads = with_num_threads(job, 2)
        alone.num_threads = 2
        assert repr(with_threads.cfg) == repr(to_plain(alone)) and job.cfg["num_threads"] is None
        assert config_digest(with_threads.cfg) == config_digest(alone)
        spec = make_trial_spec(with_threads)
        alone.tracking.run_name, alone.trainer.enable_progress_bar = with_threads.name, False
        assert repr(spec.cfg) == repr(to_plain(alone))
