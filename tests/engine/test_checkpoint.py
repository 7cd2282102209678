"""A checkpoint is whole, or known not to be; and it never runs code."""

import io
import json
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tracklight.engine import checkpoint_io as module
from tracklight.engine.checkpoint_io import (
    Checksum,
    DurableCheckpointIO,
    checksum_path,
    is_intact,
    load_plain,
    newest_resume_checkpoint,
    remove_leftovers,
)
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.stored import load_weights


def content(step: int = 1, value: float = 1.0) -> dict:
    return {
        "state_dict": {"weight": torch.full((100,), value)},
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
    }


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "step-1.ckpt"


def save(path: Path, step: int = 1, value: float = 1.0) -> Path:
    DurableCheckpointIO().save_checkpoint(content(step, value), path)
    return path


def test_what_was_saved_is_loaded(path):
    save(path)
    loaded = DurableCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(100))
    assert (Checksum.of(path).step, is_intact(path)) == (1, True)
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "step-1.ckpt",
        "step-1.ckpt.sha256.json",
    ]


def test_content_is_on_disk_before_the_metrics_checksum_name_and_folder(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd):
        events.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        fsync(fd)

    def noted_replace(source, target, **_):
        events.append(("name", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    sync = DurableCheckpointIO(before_commit=lambda: events.append(("metrics", "")))
    sync.save_checkpoint(content(), path)
    assert events == [
        ("sync", ".step-1.ckpt.tmp"),
        ("metrics", ""),
        ("sync", ".step-1.ckpt.sha256.json.tmp"),
        ("name", "step-1.ckpt.sha256.json"),
        ("name", "step-1.ckpt"),
        ("sync", path.parent.name),
    ]


def test_best_weights_of_short_epochs_wait_in_memory_for_what_builds_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_S", 60.0)
    io, weights = DurableCheckpointIO(), torch.zeros(2)
    best, step = tmp_path / "best.ckpt", tmp_path / "step-000000004.ckpt"

    def save(path: Path) -> None:
        io.save_checkpoint({"state_dict": {"w": weights}, "global_step": int(weights[0])}, path)

    for path in (best, best):
        weights += 1
        save(path)
    assert load_weights(best)["state_dict"]["w"].tolist() == [1, 1]
    weights += 1  # training goes on, the best stays what it was
    save(step)
    assert load_weights(best)["state_dict"]["w"].tolist() == [2, 2] and load_weights(step)["state_dict"][
        "w"
    ].tolist() == [3, 3]
    save(best)
    io.write_pending()
    assert load_weights(best)["state_dict"]["w"].tolist() == [3, 3] and is_intact(best)


@pytest.mark.parametrize("failing", ["fsync", "write_checksum", "replace", "sync_folder"])
def test_power_loss_while_writing_leaves_the_old_one_or_the_new_one(path, monkeypatch, failing):
    save(path, 1, 1.0)

    class PowerLoss(BaseException):
        pass

    def lose(*_, **__):
        raise PowerLoss

    owner = os if failing in ("fsync", "replace") else module
    monkeypatch.setattr(owner, failing, lose)
    with pytest.raises(PowerLoss):
        save(path, 1, 2.0)
    monkeypatch.undo()
    assert is_intact(path)
    value = load_plain(path)["state_dict"]["weight"][0].item()
    assert value == (2.0 if failing == "sync_folder" else 1.0)


@pytest.mark.parametrize("size", [0, 1, 100, -100, -1])
def test_a_truncated_one_is_not_intact(path, size):
    save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert not is_intact(path)
    with pytest.raises(RunFailed, match=f"{path} is damaged"):
        DurableCheckpointIO().load_checkpoint(path)
    with pytest.raises(BadInput, match=f"{path} is damaged"):
        load_plain(path)


def test_the_newest_is_chosen_by_content_not_by_name_or_time(tmp_path):
    named = (("z", 1), ("a", 3), ("m", 2))
    paths = [save(tmp_path / f"step-{name}.ckpt", step) for name, step in named]
    os.utime(paths[1], (1, 1))
    assert newest_resume_checkpoint(tmp_path) == paths[1]


@pytest.mark.parametrize("hurt", ["content", "checksum", "no checksum"])
def test_a_damaged_newest_is_warned_of_and_the_one_before_used(tmp_path, hurt):
    old, new = save(tmp_path / "step-1.ckpt", 1), save(tmp_path / "step-2.ckpt", 2)
    if hurt == "content":
        new.write_bytes(b"")
    elif hurt == "checksum":
        checksum_path(new).write_text("{")
    else:
        checksum_path(new).unlink()
    with pytest.warns(UserWarning, match=f"{new} is damaged"):
        assert newest_resume_checkpoint(tmp_path) == old


def test_none_intact_is_an_error_and_none_at_all_is_none(tmp_path):
    assert newest_resume_checkpoint(tmp_path) is None
    save(tmp_path / "step-1.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(RunFailed, match="not starting afresh"):
        newest_resume_checkpoint(tmp_path)


def test_a_full_disk_is_reported_with_path_and_bytes_and_the_old_one_stays(path):
    save(path, 1)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RunFailed) as caught:
            DurableCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(10**6)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path} could not be written (")
    assert "bytes so far): File too large; the previous one is untouched" in message
    assert is_intact(path) and load_plain(path)["global_step"] == 1
    assert [each.name for each in path.parent.glob(".*")] == []


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((RunFailed, OSError)):
        save(tmp_path / "file" / "1.ckpt")


def test_leftovers_of_a_crash_go_and_nothing_else(tmp_path):
    path = save(tmp_path / "1.ckpt")
    (tmp_path / ".2.ckpt.tmp").write_bytes(b"half")
    (tmp_path / ".2.ckpt.sha256.json.tmp").write_text("{")
    (tmp_path / "3.ckpt.sha256.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, checksum_path(path).name]


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def in_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Foreign:
    pass


@pytest.mark.parametrize(
    ("given_bytes", "message"),
    [
        (b"", "cannot be read: empty, cut off, or no checkpoint at all"),
        (b"a text\n", "(cannot be read|unsafe content refused)"),
        (in_bytes(content())[:2000], "cannot be read"),
        (pickle.dumps(Malice()), "(cannot be read|unsafe content refused)"),
        (in_bytes({"state_dict": {}, "x": Malice()}), "unsafe content refused"),
        (in_bytes({"state_dict": {}, "x": Foreign()}), "unsafe content refused"),
        (in_bytes(Path("x")), "unsafe content refused"),
        (in_bytes({"weight": torch.ones(3)}), "holds no `state_dict`"),
        (in_bytes([1, 2]), "holds no `state_dict`"),
        (in_bytes({"state_dict": 3}), "holds no `state_dict`"),
        (
            in_bytes({"state_dict": {}, "pytorch-lightning_version": "99.1.0"}),
            "written by pytorch-lightning 99.1.0, which is later than",
        ),
        (in_bytes({"state_dict": {}, "pytorch-lightning_version": ["x"]}), "is later than"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(path, given_bytes, message):
    path.write_bytes(given_bytes)
    with pytest.raises(BadInput, match=message) as caught:
        load_plain(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("/tmp/never").exists()


def test_a_missing_one_a_folder_and_a_remote_one_are_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        load_plain(tmp_path / "none.ckpt")
    with pytest.raises(BadInput, match="cannot be read"):
        load_plain(tmp_path)
    for address in ("http://127.0.0.1:1/a.ckpt", "https://example.org/a.ckpt"):
        with pytest.raises(BadInput, match="is remote; only local files are loaded"):
            DurableCheckpointIO().load_checkpoint(address)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(path, value):
    save(path, value=value)
    with pytest.raises(BadInput, match="weight holds NaN or infinite values"):
        load_weights(path)


def test_weights_that_are_no_tensors_are_refused(path):
    torch.save({"state_dict": {"weight": [1.0]}}, path)
    with pytest.raises(BadInput, match="weight of its `state_dict` is no tensor"):
        load_weights(path)


WHOLE = in_bytes(content())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_one_line(path, given_bytes):
    path.write_bytes(given_bytes)
    with pytest.raises(BadInput) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 8 * len(WHOLE) - 1), st.integers(0, len(WHOLE)))
def test_a_flipped_bit_or_a_cut_is_noticed_before_anything_is_read(path, bit, size):
    save(path)
    hurt = bytearray(path.read_bytes())
    hurt[bit // 8 % len(hurt)] ^= 1 << bit % 8
    for each in (bytes(hurt), path.read_bytes()[: size % len(hurt)]):
        path.write_bytes(each)
        with pytest.raises(BadInput, match="damaged"):
            load_weights(path)
        with pytest.warns(UserWarning), pytest.raises(RunFailed):
            newest_resume_checkpoint(path.parent)
        save(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 8 * len(WHOLE) - 1))
def test_without_its_checksum_a_flipped_header_is_read_whole_or_refused(path, bit):
    hurt = bytearray(WHOLE)
    hurt[bit // 8] ^= 1 << bit % 8
    path.write_bytes(hurt)
    try:
        weights = load_weights(path)["state_dict"]
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert set(map(type, weights)) <= {str}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["state_dict", "global_step", "pytorch-lightning_version", "epoch"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=6,
        ),
    )
)
def test_a_header_of_any_plain_values_is_read_or_refused_in_one_line(path, header):
    torch.save(header, path)
    try:
        load_weights(path)
    except BadInput as error:
        assert "\n" not in str(error)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.builds(json.dumps, st.dictionaries(st.text(), st.integers())))
def test_any_checksum_file_but_the_right_one_means_damaged(path, text):
    save(path)
    checksum_path(path).write_text(text)
    assert not is_intact(path)
    assert isinstance(Checksum.of(path).step, int)


def test_a_zip_of_someone_elses_is_no_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Malice()))
    with pytest.raises(BadInput):
        load_plain(path)


def test_one_that_would_unfold_to_more_than_it_is_is_refused(path):
    buffer = io.BytesIO()
    torch.save(content() | {"state_dict": {"weight": torch.zeros(10**6)}}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert path.stat().st_size < 20_000 and len(torch.load(path)["state_dict"]["weight"]) == 10**6
    with pytest.raises(BadInput, match="cannot be read"):
        load_plain(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
    ],
    ids=["a terabyte of one value", "meta", "sparse"],
)
def test_weights_that_are_larger_than_their_file_are_refused(path, tensor):
    torch.save(content() | {"state_dict": {"weight": tensor}}, path)
    with pytest.raises(BadInput, match="has only a part|unsafe|cannot be read"):
        load_weights(path)


@pytest.mark.parametrize(
    "text",
    ['{"sha256": 7, "step": 1}', '{"sha256": [[1]], "step": "x"}', '{"sha256": [], "step": 1e999}', "[1]"]
    + ["[" * 50_000, '{"step": ' + "9" * 9_999 + "}", '{"sha256": ["a"], "step": {}}', " " * 100_000 + "{}"],
)
def test_a_checksum_file_of_any_content_is_read_or_counts_as_none(path, text):
    DurableCheckpointIO().save_checkpoint(content(), path)
    checksum_path(path).write_text(text)
    assert not is_intact(path)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RunFailed, match="no checkpoint"):
        newest_resume_checkpoint(path.parent)


class Thing:
    """What only code could rebuild."""


PLAIN = {"width": 3, "name": "x", "rates": [0.1, 0.2], "nested": {"deep": None}, "weight": torch.ones(2)}
OBJECTS = {
    "net": torch.nn.ReLU(),
    "factory": partial(torch.optim.Adam, lr=0.1),
    "thing": Thing,
    "mixed": [1, Thing()],
    "path": Path("a/b"),
}


def test_of_hyperparameters_the_plain_ones_are_kept_and_objects_left_out(path):
    turned = {
        "rate": np.float64(0.5),
        "shape": (1, 2),
        "config": OmegaConf.create({"a": [1]}),
    }
    saved = content() | {
        "hyper_parameters": PLAIN | OBJECTS | turned | {"within": {"net": torch.nn.ReLU(), "kept": 1}},
        "datamodule_hyper_parameters": OmegaConf.create({"batch_size": 4, "sizes": [1, 2]}),
        "datamodule_hparams_type": type(OmegaConf.create()),
    }
    DurableCheckpointIO().save_checkpoint(saved, path)
    loaded = load_plain(path)
    weight = loaded["hyper_parameters"].pop("weight")
    assert torch.equal(weight, torch.ones(2))
    assert loaded["hyper_parameters"] == {key: value for key, value in PLAIN.items() if key != "weight"} | {
        "rate": 0.5,
        "shape": [1, 2],
        "config": {"a": [1]},
        "within": {"kept": 1},
    }
    assert loaded["datamodule_hyper_parameters"] == {"batch_size": 4, "sizes": [1, 2]}
    assert saved["hyper_parameters"]["thing"] is Thing  # the module's own are left alone


def test_numbers_of_numpy_in_a_callbacks_state_are_numbers(path):
    DurableCheckpointIO().save_checkpoint(
        content() | {"callbacks": {"Mine": {"best": np.float64(0.5)}}}, path
    )
    assert load_plain(path)["callbacks"] == {"Mine": {"best": 0.5}}


@pytest.mark.parametrize("where", ["callbacks", "of a hook"])
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(path, where):
    save(path, value=1.0)
    with pytest.raises(RunFailed, match="plain values and tensors, not .*test_checkpoint.Thing of"):
        DurableCheckpointIO().save_checkpoint(content(value=2.0) | {where: {"mine": Thing()}}, path)
    assert load_plain(path)["state_dict"]["weight"][0] == 1.0
