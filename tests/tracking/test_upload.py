"""What goes to a store that keeps artifacts elsewhere."""

from types import SimpleNamespace

from tracklight.tracking import sender
from tracklight.tracking.sender import MlflowWriter, temporary_path


def test_each_file_is_sent_once_and_again_when_it_changes_and_none_that_is_being_written(
    tmp_path, monkeypatch
):
    sent = []
    repository = SimpleNamespace(log_artifact=lambda path, target: sent.append((path, target)))
    uri = "mlflow-artifacts:/1/run/artifacts"
    found = {(uri, "http://host"): repository}
    monkeypatch.setattr(sender, "get_artifact_repository", lambda uri, tracking_uri: found[uri, tracking_uri])
    client = SimpleNamespace(tracking_uri="http://host")
    info = SimpleNamespace(run_id="run", artifact_uri=uri)
    wal = SimpleNamespace(path=tmp_path / "points.wal")
    writer = MlflowWriter(client, SimpleNamespace(info=info), wal, None)
    whole, inside = writer.artifacts / "plots.html", writer.artifacts / "logs" / "0.tmp"
    inside.parent.mkdir(parents=True)
    inside.write_text("kept")
    whole.write_text("old")
    temporary_path(whole).write_text("half of the ne")
    writer.upload_artifacts()
    assert sorted(sent) == [(str(inside), "logs"), (str(whole), None)]
    sent.clear()
    writer.upload_artifacts()
    assert sent == []
    temporary_path(whole).replace(whole)
    writer.upload_artifacts()
    assert sent == [(str(whole), None)]
