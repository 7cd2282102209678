"""Which processes make up a run: what launchers and outer jobs leave in the environment."""

import os

import pytest
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from process import free_port
from tracklight.engine import distributed
from tracklight.errors import BadInput

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
SRUN = {
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"},
    **{"SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"},
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.fixture
def environ(monkeypatch):
    """Sets variables in an environment without any of a launcher's."""
    for name in (*os.environ,):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "WORLD_SIZE")) or name in distributed.RANKS:
            monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def environ(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return environ


@pytest.mark.parametrize("name", distributed.RANKS)
@pytest.mark.parametrize("value", ["abc", "-1", "1.0"])
def test_a_rank_that_is_no_number_is_named_with_its_cure(environ, name, value):
    environ({name: value})
    with pytest.raises(
        BadInput, match=rf"^{name}={value} in the environment is no rank; try `unset {name}`$"
    ):
        distributed.check_ranks()


@pytest.mark.parametrize("left", [*({name: "3"} for name in distributed.RANKS), BATCH_SCRIPT])
def test_a_process_alone_is_rank_zero_whatever_an_outer_job_left(environ, left):
    environ(left)
    rank_zero_only.rank = 3  # as Lightning has read it
    distributed.check_ranks()
    distributed.settle_ranks(1, 1)
    assert not distributed.is_nonzero_rank() and rank_zero_only.rank == 0
    assert isinstance(distributed.cluster_environment(), LightningEnvironment)


@pytest.mark.parametrize("devices", [2, "2", [0, 1], "auto", -1])
def test_the_first_of_the_processes_that_lightning_launches_ignores_what_an_outer_job_left(environ, devices):
    environ({"RANK": "1", "SLURM_PROCID": "3", "NODE_RANK": "1"})
    distributed.settle_ranks(devices, 1)
    assert not distributed.is_nonzero_rank()
    for name in ("LOCAL_RANK", "NODE_RANK"):
        environ({name: "1"})
        distributed.settle_ranks(devices, 1 + (name == "NODE_RANK"))
        assert distributed.is_nonzero_rank()
        os.environ.pop(name)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN, "torchrun launched 2 processes, and trainer.devices=1 .* is 1; try trainer.devices=2, or"),
        (
            SRUN,
            "srun launched 4 processes, and trainer.devices=1 .* is 1; try trainer.devices=4, or leave srun",
        ),
    ],
)
def test_a_launch_of_more_processes_than_the_config_has_is_refused(environ, variables, said):
    environ(variables)
    with pytest.raises(BadInput, match=said):
        distributed.settle_ranks(1, 1)


def test_a_launch_of_fewer_processes_than_the_config_has_is_refused_where_none_are_added(environ):
    environ(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    with pytest.raises(BadInput, match="torchrun launched 1 process, and trainer.devices=2 .* is 2"):
        distributed.settle_ranks(2, 1)
    distributed.settle_ranks(1, 1)


@pytest.mark.parametrize(
    ("variables", "kind", "devices"), [(TORCHRUN, TorchElasticEnvironment, 2), (SRUN, SLURMEnvironment, 4)]
)
def test_a_launch_as_the_config_asks_for_keeps_its_ranks_and_requeues_no_job(
    environ, variables, kind, devices
):
    environ(variables)
    distributed.settle_ranks(devices, 1)
    environment = distributed.cluster_environment()
    assert isinstance(environment, kind) and distributed.is_nonzero_rank()
    assert environment.global_rank() == int(variables.get("RANK", variables.get("SLURM_PROCID")))
    assert not getattr(environment, "auto_requeue", False)


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SRUN])
def test_nothing_is_asked_of_rank_zero_where_there_is_nothing_to_continue(environ, variables):
    environ(variables)
    assert distributed.open_rank_store(num_nodes=2, resume=None) is None


def test_processes_that_lightning_launches_ask_nothing_of_rank_zero(environ):
    environ({"LOCAL_RANK": "1"})
    assert distributed.open_rank_store(num_nodes=1, resume="auto") is None
    assert distributed.open_rank_store(num_nodes=2, resume="0123abcd") is None  # nodes resume by auto only


def test_agents_of_torchrun_on_several_machines_share_no_run_to_continue(environ):
    environ(TORCHRUN)
    assert distributed.can_resume(TorchElasticEnvironment())
    environ({"GROUP_WORLD_SIZE": "2"})
    assert not distributed.can_resume(TorchElasticEnvironment())
    assert distributed.open_rank_store(num_nodes=2, resume="auto") is None
    environ(SRUN)
    assert distributed.can_resume(SLURMEnvironment())


def test_the_count_of_processes_is_checked_once_the_config_of_a_run_to_resume_is_known(environ):
    environ(TORCHRUN)
    distributed.settle_ranks(1, 1, resume="0123abcd")
    assert distributed.is_nonzero_rank() and rank_zero_only.rank == 0  # as it was
    with pytest.raises(BadInput, match="torchrun launched 2 processes"):
        distributed.settle_ranks(1, 1)


def test_the_others_get_what_rank_zero_shares_and_nothing_of_an_earlier_start(environ):
    environment = LightningEnvironment()
    environ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    first = distributed.RankStore(environment)
    assert first.share("checkpoint", None) is None
    environ({"TORCHELASTIC_RESTART_COUNT": "1"})
    distributed.RankStore(environment).share("checkpoint", "step.ckpt")
    environ({"NODE_RANK": "1"})
    assert distributed.RankStore(environment).share("checkpoint", None) == "step.ckpt"
