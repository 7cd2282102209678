"""Two processes, on one node or on two, train as one does with the same global batch."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from configs import BATCH_END, MLP

from process import TESTS, Process, TrialResult, free_port
from trainee import SCRIPT

pytestmark = pytest.mark.slow

ENDED_S = 30.0
FASTER = [["spare_model"]]
COMMON = (
    *(word for word in MLP if not word.startswith("data.batch_size=")),
    *("scheduler=cosine", "trainer.precision=64-true", "trainer.max_epochs=3", "tracking.figures=false"),
)
ONE = (*COMMON, "data.batch_size=16")
PAIR = (*COMMON, "data.batch_size=8", "trainer.strategy=ddp")
DEVICES = (*PAIR, "trainer.devices=2")
SLOW = "+callbacks.slow={_target_: foreign.Slow, seconds: 2.0}"
NODES = (*PAIR, "trainer.devices=1", "trainer.num_nodes=2")
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "GLOO_"))}
PYTHONPATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))


class Network:
    """Two network namespaces, each with an address of its own, as two machines have."""

    addresses = ("10.213.0.1", "10.213.0.2")

    def __init__(self) -> None:
        self.names = tuple(f"tracklight-{os.getpid()}-{rank}" for rank in (0, 1))
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "-n",
            self.names[0],
            "link",
            "add",
            "node0",
            "type",
            "veth",
            "peer",
            "node1",
            "netns",
            self.names[1],
        )
        for rank, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"{self.addresses[rank]}/24", "dev", f"node{rank}")
            ip("-n", name, "link", "set", f"node{rank}", "up")

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """The variables of docs/scale.md."""
        return {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": str(port), "NODE_RANK": str(rank)}

    @property
    def processes(self) -> str:
        """The ids of all processes on both nodes."""
        return "".join(ip("netns", "pids", name) for name in self.names)

    def close(self) -> None:
        for pid in self.processes.split():  # of a test that failed
            os.kill(int(pid), signal.SIGKILL)
        for name in self.names:
            ip("netns", "delete", name)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("needs ip (Debian: iproute2)")
    if subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to make network namespaces, as root has it")
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="module")
def one(trainees, tmp_path_factory) -> TrialResult:
    """One process with the whole batch."""
    directory = tmp_path_factory.mktemp("one") / "runs"
    process = trainees.train(directory, *ONE, faults=FASTER)
    assert process.exit_code == 0, process.stderr
    return TrialResult(directory)


@pytest.fixture(scope="module")
def two(trainees, tmp_path_factory) -> TrialResult:
    """Two processes of one node, each with half of the batch."""
    directory = tmp_path_factory.mktemp("two") / "runs"
    process = trainees.train(directory, *DEVICES, faults=FASTER, env={"PYTHONPATH": PYTHONPATH})
    assert process.exit_code == 0, process.stderr
    return TrialResult(directory)


def test_the_batch_size_is_that_of_a_device_and_two_with_half_of_it_train_as_one(one, two):
    assert [status for _, status in two.runs] == ["FINISHED"]
    assert two.steps("train/loss") == [*range(1, 3 * 150 + 1)]  # 2400 examples in batches of 2 times 8
    assert two.logged == one.logged and set(two.logged.values()) == {1}
    values = [{point[:2]: point[2] for point in each.points if "/" in point[0]} for each in (one, two)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    weights, others = (each.checkpoint("last")["state_dict"] for each in (one, two))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert str(weight.dtype) == "torch.float64"
        assert others[name].numpy() == pytest.approx(weight.numpy(), rel=1e-6)


def test_torchrun_starts_killed_processes_again_and_the_run_ends_in_the_bits_of_the_devices_alone(
    trainees, two, tmp_path
):
    directory = tmp_path / "runs"
    trainees.furnish(directory)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    words = (*DEVICES, SLOW, "resume=auto", f"tracking.dir={directory}")
    env = ENVIRON | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    # Else gloo may find the address of a process of the start before in the agent's store.
    env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "output").open("w+") as output:
        pipes = {"stdout": output, "stderr": subprocess.STDOUT}
        agent = subprocess.Popen([sys.executable, *torchrun, SCRIPT, *words], cwd=tmp_path, env=env, **pipes)
        try:
            end = time.monotonic() + 90
            while not list(directory.glob("artifacts/*/artifacts/checkpoints/step-*")):
                assert agent.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()
                time.sleep(0.1)
            psutil.Process(agent.pid).children()[1].kill()
            assert agent.wait(120) == 0, (tmp_path / "output").read_text()
        finally:
            agent.terminate()  # which ends its processes, too
            agent.wait(30)
    result = TrialResult(directory)
    assert result.differences(two) == []
    assert f"resume=auto: run {result.run_id}" in (tmp_path / "output").read_text()


def test_two_nodes_give_the_bits_of_two_devices_of_one(trainees, network, two, tmp_path):
    trainees.furnish(tmp_path / "runs")
    port, both = free_port(), []
    for rank, name in enumerate(network.names):
        env = ENVIRON | {"PYTHONPATH": PYTHONPATH} | network.environment(rank, port)
        python = ("ip", "netns", "exec", name, sys.executable, SCRIPT)
        command = [*python, *NODES, f"tracking.dir={tmp_path / 'runs'}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        both.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
    outputs = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "plain Lightning): trainer.num_nodes=2\n" in outputs[0][0]
    assert TrialResult(tmp_path / "runs").differences(two) == []
    assert network.processes == ""


def start_nodes(trainees, network: Network, directory: Path, mark: Path, *faults: list) -> list[Process]:
    """Start both and return once the second is amid its second epoch, at `mark`, until that is gone."""
    meet = ["meet", BATCH_END, 200, str(mark)]
    port, both = free_port(), []
    for rank, name in enumerate(network.names):
        more = [*FASTER, ["enter_network", name], *faults, *([meet] if rank else [])]
        both.append(trainees.start(directory, NODES, more, env=network.environment(rank, port)))
    both[1].wait_for(mark)
    return both


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_node_is_killed_the_other_ends(trainees, network, tmp_path, rank):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    both = start_nodes(trainees, network, directory, mark)
    both[rank].send(signal.SIGKILL)
    mark.unlink()
    other = both[1 - rank]
    assert other.wait(ENDED_S) == 1
    line = other.stderr.splitlines()[-1]
    assert line.startswith("error: another of the 2 processes of this run is gone")
    assert (
        line.endswith("resume=auto continues it if all nodes are given it")
        and "Traceback" not in other.stderr
    )
    assert both[rank].wait(ENDED_S) == -signal.SIGKILL and network.processes == ""
    start = f"init_from={TrialResult(directory).run_id}"
    process = trainees.train(directory, *ONE, start, faults=FASTER)  # marks runs whose process is gone
    statuses = [status for _, status in TrialResult(directory).runs]
    assert statuses == ["FAILED" if rank else "KILLED", "FINISHED"], process.stderr


def test_two_nodes_that_are_killed_continue_in_the_same_run_to_the_same_bits(
    trainees, network, two, tmp_path
):
    directory, mark, port = tmp_path / "runs", tmp_path / "mark", free_port()
    both = start_nodes(trainees, network, directory, mark)
    for process in both:
        process.send(signal.SIGKILL)
    mark.unlink()
    assert [process.wait(ENDED_S) for process in both] == [-signal.SIGKILL] * 2
    run_id = TrialResult(directory).run_id
    both = [
        trainees.start(
            directory,
            (*NODES, "resume=auto"),
            [*FASTER, ["enter_network", name]],
            env=network.environment(rank, port),
        )
        for rank, name in enumerate(network.names)
    ]
    assert [process.wait() for process in both] == [0, 0], [process.stderr for process in both]
    assert f"resume=auto: run {run_id}" in both[0].stdout
    result = TrialResult(directory)
    assert [status for _, status in result.runs] == ["FINISHED"] and result.differences(two) == []
    assert set(result.logged.values()) == {1} and network.processes == ""


def test_when_the_network_between_two_nodes_is_cut_both_end(trainees, network, tmp_path):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    impatient = ["put", "tracklight.engine.distributed:WAIT_S", 15.0]
    both = start_nodes(trainees, network, directory, mark, impatient)
    ip("-n", network.names[0], "link", "set", "node0", "down")
    mark.unlink()
    assert [process.wait(15 + ENDED_S) for process in both] == [1, 1]
    for process in both:
        assert "is gone, or has not answered for 15 s;" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
    assert TrialResult(directory).status == "FAILED" and network.processes == ""
