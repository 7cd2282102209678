"""A tracking server that dies while a run trains: the run goes on, its points arrive once."""

import signal

import pytest
from configs import BLOCK_END, CONFIGS, EACH_EPOCH, EPOCHS

from process import TrialResult, free_port

FAULTS = [
    ["spare_model"],
    EACH_EPOCH,
    ["put", "tracklight.tracking.store:_TIMEOUT_S", {"server": 2.0}],
    ["put", "tracklight.tracking.sender:_PERIOD_S", 0.05],
]
SHORT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
}


@pytest.mark.slow
@pytest.mark.server
def test_points_outlive_a_server_that_dies_for_a_while_or_for_good(trainees, undisturbed, tmp_path):
    port = free_port()
    server = trainees.serve(tmp_path / "server", port)
    command = (*CONFIGS["blocks"], EPOCHS, f"tracking.uri=http://127.0.0.1:{port}")
    gone, back = tmp_path / "gone", tmp_path / "back"

    meetings = [["meet", BLOCK_END, 5, str(gone)], ["meet", BLOCK_END, 15, str(back)]]
    process = trainees.start(tmp_path / "runs", command, [*FAULTS, *meetings], SHORT)
    process.wait_for(gone)
    server.send(signal.SIGKILL, group=True)
    server.wait()
    gone.unlink()
    process.wait_for(back)
    server = trainees.serve(tmp_path / "server", port)
    back.unlink()
    assert process.wait() == 0, process.stderr
    first = TrialResult(tmp_path / "server")
    assert (first.status, first.points) == ("FINISHED", undisturbed("blocks").points)

    process = trainees.start(
        tmp_path / "runs", (*command, "tracking.experiment=second"), [*FAULTS, meetings[0]], SHORT
    )
    process.wait_for(gone)
    server.send(signal.SIGKILL, group=True)
    server.wait()
    gone.unlink()
    assert process.wait() == 0, process.stderr
    assert "waits in" in process.stderr
    assert TrialResult(tmp_path / "server").status == "RUNNING"
    server = trainees.serve(tmp_path / "server", port)
    trainees.train(tmp_path / "runs", *command, "init_from=0000", env=SHORT)  # a start of anything
    both = TrialResult(tmp_path / "server")
    assert [status for _, status in both.runs] == ["FINISHED", "FINISHED"]
    assert both.points == sorted(2 * undisturbed("blocks").points)
    server.send(signal.SIGKILL, group=True)
