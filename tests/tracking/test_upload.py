"""What goes to a store that keeps artifacts elsewhere."""

from types import SimpleNamespace

from tracklight.tracking.sender import Upload, temporary


def test_each_file_is_sent_once_and_again_when_it_changes_and_none_that_is_being_written(tmp_path):
    sent = []
    client = SimpleNamespace(log_artifact=lambda run_id, path, target: sent.append((path, target)))
    upload = Upload(client, "run", "mlflow-artifacts:/1/run/artifacts", tmp_path)
    whole, inside = tmp_path / "plots.html", tmp_path / "logs" / "0.tmp"
    inside.parent.mkdir()
    inside.write_text("kept")
    whole.write_text("old")
    temporary(whole).write_text("half of the ne")
    upload.all()
    assert sorted(sent) == [(str(inside), "logs"), (str(whole), None)]
    sent.clear()
    upload.all()
    assert sent == []
    temporary(whole).replace(whole)
    upload.all()
    assert sent == [(str(whole), None)]
