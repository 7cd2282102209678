import math
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from disturbances import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from tracklight.errors import RunFailed
from tracklight.tracking.wal import Call, Points, WriteAheadLog, read_records

KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
POINT = st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(width=64))
BLOCKS = st.lists(st.tuples(KEYS, st.lists(POINT, min_size=1, max_size=5)), max_size=6)


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def content(path: Path) -> list:
    return [
        (record.key, record.steps, tuple(map(bits, record.values)))
        for record, _ in read_records(path)
        if isinstance(record, Points)
    ]


def write(path: Path, blocks) -> list:
    wal = WriteAheadLog(path)
    for key, points in blocks:
        wal.add_points(key, [step for step, _ in points], [value for _, value in points])
    wal.close()
    return [
        (key, tuple(step for step, _ in points), tuple(bits(value) for _, value in points))
        for key, points in blocks
    ]


@given(BLOCKS)
@settings(deadline=None, max_examples=50)
def test_every_point_comes_back_bit_for_bit(tmp_path_factory, blocks):
    path = tmp_path_factory.mktemp("wal") / "points.wal"
    written = write(path, blocks)
    assert content(path) == written


@given(BLOCKS, st.data())
@settings(deadline=None, max_examples=80)
def test_a_damaged_file_opens_as_what_was_written_before_the_damage(tmp_path_factory, blocks, data):
    path = tmp_path_factory.mktemp("wal") / "points.wal"
    written = write(path, blocks)
    raw = bytearray(path.read_bytes())
    ends = [end for _, end in read_records(path)]
    at = data.draw(st.integers(0, max(0, len(raw) - 1)))
    if raw and data.draw(st.booleans()):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        raw = raw[:at]
    path.write_bytes(raw)
    whole = sum(end <= at for end in ends)

    wal = WriteAheadLog(path)
    assert content(path) == written[:whole]
    assert path.stat().st_size == wal.end
    wal.add_points("after", [2**63 - 1], [1.0])
    wal.close()
    assert content(path) == [*written[:whole], ("after", (2**63 - 1,), (bits(1.0),))]


def test_points_at_or_below_the_highest_step_of_their_key_are_skipped(tmp_path):
    path = tmp_path / "points.wal"
    write(path, [("a", [(1, 0.1), (2, 0.2), (3, 0.3)]), ("b", [(9, 9.0)])])
    wal = WriteAheadLog(path)
    wal.add_points("a", [1, 2, 3, 4], [-1.0, -1.0, -1.0, 0.4])
    wal.add_points("a", [5], [0.5])
    wal.add_points("b", [10], [10.0])
    wal.add_points("c", [1], [1.0])
    steps = [(key, steps) for key, steps, _ in content(path)][2:]
    assert steps == [("a", (4,)), ("a", (5,)), ("b", (10,)), ("c", (1,))]


STREAM = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), max_size=30)


@given(STREAM, st.data())
def test_a_continued_run_logs_each_point_once_wherever_it_was_killed_and_however_many_share_a_step(
    tmp_path_factory, stream, data
):
    steps, points = {"a": 0, "b": 0}, []
    for index, (key, more) in enumerate(stream):  # as runs log them: no step before an earlier one's
        steps[key] += more
        points.append((key, steps[key], float(index)))
    path = tmp_path_factory.mktemp("wal") / "points.wal"
    start, position = 0, None  # of the newest checkpoint
    for end in [*data.draw(st.lists(st.integers(0, len(points)), max_size=4)), len(points)]:
        end = max(start, end)  # a life may be shorter than the one before
        wal = WriteAheadLog(path)
        wal.add_call("status", status="RUNNING")
        if position is not None:
            wal.replay_from(position)
        saved = data.draw(st.none() | st.integers(start, end))
        for index in range(start, end + 1):
            if index == saved:
                position = wal.position
            if index < end:
                key, step, value = points[index]
                wal.add_points(key, [step], [value])
        wal.close()
        start = start if saved is None else saved
    logged = [(key, step[0], struct.unpack("<d", value[0])[0]) for key, step, value in content(path)]
    assert logged == points


def test_a_position_in_another_file_of_the_run_counts_for_nothing(tmp_path, monkeypatch):
    clock = iter(range(1, 10**6, 1000))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
    wals = [WriteAheadLog(tmp_path / name) for name in ("here.wal", "there.wal")]
    for wal in wals:
        wal.add_points("a", [1, 1], [0.1, 0.2])
    there = WriteAheadLog(tmp_path / "there.wal")  # on another machine, from a checkpoint of here
    there.replay_from(wals[0].position)
    there.add_points("a", [1, 1, 1], [0.1, 0.2, 0.3])
    assert [steps for _, steps, _ in content(there.path)] == [(1, 1), (1,)]


def test_the_filter_stands_as_of_opening(tmp_path):
    wal = WriteAheadLog(tmp_path / "points.wal")
    wal.add_points("a", [5], [5.0])
    wal.add_points("a", [4], [4.0])
    assert [steps for _, steps, _ in content(wal.path)] == [(5,), (4,)]


def test_a_clock_that_jumps_backwards_leaves_timestamps_in_order(tmp_path, monkeypatch):
    path = tmp_path / "points.wal"
    clock = iter([2_000_000_000_000, 1_500_000_000_000])  # one reading an opening
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
    ticks = iter([10, 15, 20, 1010, 1012])  # since the machine was started, which it is again in between
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(ticks) * 1_000_000)
    wal = WriteAheadLog(path)
    wal.add_points("a", [1], [1.0])
    wal.add_points("a", [2], [2.0])
    wal.close()
    wal = WriteAheadLog(path)
    wal.add_points("a", [3], [3.0])
    stamps = [record.timestamp_ms - 2_000_000_000_000 for record, _ in read_records(path)]
    assert stamps == [5, 10, 12]


def test_calls_keep_their_place_among_points(tmp_path):
    wal = WriteAheadLog(tmp_path / "points.wal")
    wal.add_points("a", [1], [math.nan])
    wal.add_call("tags", values={"ä": "1"})
    wal.add_points("a", [2], [math.inf])
    first, call, last = (record for record, _ in read_records(wal.path))
    assert isinstance(first, Points) and isinstance(last, Points)
    assert isinstance(call, Call) and call.arguments == {"values": {"ä": "1"}}


def test_a_full_disk_is_named_and_leaves_the_file_whole(tmp_path):
    wal = WriteAheadLog(tmp_path / "points.wal")
    with full_disk(2000), pytest.raises(RunFailed) as caught:
        for block in range(100):
            wal.add_points("train/loss", range(block * 10, block * 10 + 10), [0.5] * 10)
    size = wal.path.stat().st_size
    assert str(wal.path) in str(caught.value) and "bytes" in str(caught.value)
    assert size == wal.end <= 2000
    wal.add_points("train/loss", [10_000], [1.0])
    assert [record.steps[-1] for record, _ in read_records(wal.path)][-2:] == [
        block * 10 - 1,
        10_000,
    ]


def test_a_closed_file_writes_into_no_other_one(tmp_path):
    wal = WriteAheadLog(tmp_path / "points.wal")
    wal.close()
    other = (tmp_path / "other").open("wb", buffering=0)  # gets the number that was free
    with pytest.raises(RunFailed):
        wal.add_points("a", [1], [1.0])
    assert other.tell() == 0 and (tmp_path / "other").read_bytes() == b""
    other.close()


@pytest.mark.parametrize("stale", ["", "x", "7", "-3"])
def test_a_senseless_confirmation_sends_all_again(tmp_path, stale):
    path = tmp_path / "points.wal"
    write(path, [("a", [(1, 1.0)])])
    path.with_suffix(".sent").write_text(stale)
    assert WriteAheadLog(path).sent == 0


def test_the_confirmed_offset_survives_and_damage_before_it_is_told(tmp_path):
    path = tmp_path / "points.wal"
    write(path, [("a", [(1, 1.0)]), ("a", [(2, 2.0)])])
    wal = WriteAheadLog(path)
    wal.confirm(wal.end)
    wal.close()
    again = WriteAheadLog(path)
    assert (again.sent, again.damaged) == (again.end, False)
    os.truncate(path, again.end - 1)
    assert WriteAheadLog(path).damaged


def test_a_block_of_64_points_costs_the_training_thread_one_write(tmp_path, monkeypatch):
    wal = WriteAheadLog(tmp_path / "points.wal")
    writes, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write(fd, data))
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("waits for the disk"))
    wal.add_points("train/loss", range(64), [0.1 * i for i in range(64)])
    assert len(writes) == 1


def framed(payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<II", len(payload) if length is None else length, zlib.crc32(payload)) + payload


@pytest.mark.parametrize(
    "record",
    [
        framed(b"", 2**32 - 1),
        framed(b"C" + bytes(8) + b"[" * 50_000),
        framed(b"C" + bytes(8) + b'["call"]'),
        framed(b"C" + bytes(8) + b'{"values": {}}'),
        framed(b"C" + bytes(8) + b'{"call": ' + b"9" * 9_999 + b"}"),
        framed(b"P" + bytes(8) + struct.pack("<HI", 4, 0) + b"loss"),
        framed(b"P" + bytes(8) + struct.pack("<HI", 4, 2**31) + b"loss" + bytes(16)),
        framed(b"P" + bytes(8) + struct.pack("<HI", 2, 1) + b"\xff\xff" + bytes(16)),
        framed(b"P" + bytes(8)),
    ],
)
def test_a_record_that_is_whole_and_none_of_ours_ends_the_log(tmp_path, record):
    path = tmp_path / "points.wal"
    log = WriteAheadLog(path)
    log.add_points("loss", (1,), (0.5,))
    log.close()
    path.write_bytes((whole := path.read_bytes()) + record)
    (tmp_path / "points.sent").write_text("9" * 100_000)
    log = WriteAheadLog(path)
    assert (log.end, log.repeats, log.sent) == (len(whole), {"loss": (1, 1)}, 0)
    log.close()
    assert path.read_bytes() == whole


def test_a_record_of_gigabytes_is_not_held_in_memory(tmp_path):
    path = tmp_path / "log"
    whole = write(path, [("loss", [(1, 1.0)])])
    with path.open("ab") as file:
        file.write(struct.pack("<II", 3_000_000_000, 0))
    os.truncate(path, 3_100_000_000)  # takes no place on the disk
    tracemalloc.start()
    assert content(path) == whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000_000


def test_a_log_that_leads_elsewhere_is_not_written_to(tmp_path):
    (tmp_path / "thesis").write_text("many words")
    (tmp_path / "points.wal").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError):
        WriteAheadLog(tmp_path / "points.wal")
    assert (tmp_path / "thesis").read_text() == "many words"


def test_only_what_is_new_is_synced(tmp_path, monkeypatch):
    WriteAheadLog(tmp_path / "wal").close()
    wal, synced, fsync = WriteAheadLog(tmp_path / "wal"), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(wal.end) or fsync(number))
    for step in (1, 2):
        wal.add_points("loss", (step,), (0.5,))
        wal.sync()
        wal.sync()
        assert synced[step - 1 :] == [wal.end]
    wal.close()
    wal = WriteAheadLog(tmp_path / "wal")  # what a dead process wrote may not be on the disk
    wal.sync()
    assert len(synced) == 3
    wal.close()
