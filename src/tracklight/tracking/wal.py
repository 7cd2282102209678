"""The write-ahead log of one run: buffer, outage spool and replay filter in one append-only file.

One system call writes a record, so a killed process loses nothing that was logged. A record that a
crash left half-written is cut off when the file is next opened.
"""

import contextlib
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracklight.errors import RunFailed
from tracklight.paths import read_bounded
from tracklight.tracking.tags import NAME_TAG

_HEAD = struct.Struct("<II")  # length and CRC-32 of the payload
_POINTS = struct.Struct("<cqHI")  # kind, timestamp, bytes of the key, number of points
_CALL = struct.Struct("<cq")  # kind, timestamp
_MAX_BYTES = 2**26  # of a record; of ours the longest has less than a megabyte


@dataclass(frozen=True, slots=True)
class Points:
    """Values of one metric at some steps, all with one timestamp."""

    timestamp_ms: int
    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Any other request to MLflow: params, tags, a status."""

    timestamp_ms: int
    name: str
    arguments: dict[str, Any]

    @property
    def fills_tables(self) -> bool:
        """Whether it only fills tables of a database; a changed name of the run would do more."""
        if self.name == "status":
            return self.arguments["status"] != "RUNNING"
        if self.name in ("params", "tags"):
            return NAME_TAG not in self.arguments["values"]
        return self.name == "input"


class WriteAheadLog:
    """The file, open for appending; the caller holds the run's lock."""

    def __init__(self, path: Path, start_ms: int = 0):
        self.path = path
        self.end = 0  # bytes of whole records, so far
        self._synced = 0  # of them, those that are certainly on the disk
        # Bytes that MLflow has confirmed; after a crash at most those: sent again, a point changes nothing.
        self.sent = 0
        # Of each metric, how many points a continued run will log again, and their highest step.
        self.repeats: dict[str, tuple[float, int]] = {}
        self.last_status: str | None = None  # argument of the last `status` call
        self.last_ms = start_ms  # timestamp of the last record at opening, if there is one
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        self._sent_path = path.with_suffix(".sent")
        confirmed = 0
        with contextlib.suppress(OSError, ValueError):
            confirmed = int(read_bounded(self._sent_path))
        for record, end in read_records(path):
            self.end = end
            if end == confirmed:
                self.sent = end
            self.last_ms = max(self.last_ms, record.timestamp_ms)
            self._expect(record)
            if isinstance(record, Call) and record.name == "status":
                self.last_status = record.arguments.get("status")
        self.damaged = confirmed > self.end  # whether MLflow had confirmed more than the file still holds
        self._zero_ms = max(self.last_ms, time.time_ns() // 1_000_000) - time.monotonic_ns() // 1_000_000
        if os.fstat(self._fd).st_size > self.end:
            os.ftruncate(self._fd, self.end)

    @property
    def position(self) -> tuple[int, int, dict[str, tuple[float, int]]]:
        """When the file was begun, its end so far, and what before that end is still to come again.

        The beginning tells it from another file of the same run.
        """
        began = next((record.timestamp_ms for record, _ in read_records(self.path)), 0)
        return began, self.end, {key: each for key, each in self.repeats.items() if each[0]}

    def replay_from(self, position: Sequence[Any]) -> None:
        """Expect again what a position says and the points after it: others are in a checkpoint's past."""
        began, start, *left = position  # older positions do not say what is still to come
        if began == self.position[0] and not self.damaged:
            self.repeats = dict(*left)
            for record, _ in read_records(self.path, start, self.end):
                self._expect(record)

    def _expect(self, record: Points | Call) -> None:
        if isinstance(record, Points):
            count, highest = self.repeats.get(record.key, (0, record.steps[0]))
            self.repeats[record.key] = count + len(record.steps), max(highest, *record.steps)

    def add_points(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Append points of a metric, bit for bit, but those that the file has from before a crash.

        They come again in the same order. Several points may share a step, so they are counted.
        Where the disk does not take the others, raise RunFailed; the file stays as it was.
        """
        if key in self.repeats:
            count, highest = self.repeats[key]
            skipped = 0
            while skipped < min(count, len(steps)) and steps[skipped] <= highest:
                skipped += 1
            self.repeats[key] = count - skipped, highest
            steps, values = steps[skipped:], values[skipped:]
        if not (n := len(steps)):
            return
        name = key.encode()
        body = name + struct.pack(f"<{n}q{n}d", *steps, *values)
        with self._lock:
            self._append(_POINTS.pack(b"P", self.now_ms(), len(name), n) + body)

    def add_call(self, name: str, /, **arguments: Any) -> None:
        """Append a call, whose arguments are JSON values; raise as `add_points` does."""
        body = json.dumps({"call": name} | arguments).encode()
        with self._lock:
            self._append(_CALL.pack(b"C", self.now_ms()) + body)
            if name == "status":
                self.last_status = arguments["status"]

    def now_ms(self) -> int:
        """Return the time, in ms since 1970, by a clock that is never set back."""
        return self._zero_ms + time.monotonic_ns() // 1_000_000

    def _append(self, payload: bytes) -> None:
        record = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            if os.write(self._fd, record) < len(record):
                raise OSError(0, "the file system took only a part")
        except OSError as error:
            with contextlib.suppress(OSError):  # else it is cut at the next open
                os.ftruncate(self._fd, self.end)
            raise RunFailed(f"cannot write {len(record)} bytes to {self.path}: {error.strerror}") from None
        self.end += len(record)

    def sync(self) -> None:
        """Return once everything appended is on the disk."""
        if (end := self.end) > self._synced:
            os.fsync(self._fd)
            self._synced = end

    def confirm(self, end: int) -> None:
        """Record beside the file that MLflow has everything before this offset."""
        self.sent = end
        with contextlib.suppress(OSError):  # a record that lags behind is harmless
            self._sent_path.write_text(f"{end}\n")

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1  # another file may get its number


def read_records(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[Points | Call, int]]:
    """Yield the whole records between two offsets, each with the offset of its end."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        file.seek(start)
        while stop is None or start < stop:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            length, crc = _HEAD.unpack(head)
            payload = file.read(min(length, _MAX_BYTES))
            if len(payload) < max(length, _CALL.size) or zlib.crc32(payload) != crc:
                return
            try:
                record = _parse(payload)
            except (struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
                return  # whole, and yet nothing that we wrote
            start += _HEAD.size + length
            yield record, start


def _parse(payload: bytes) -> Points | Call:
    if payload[:1] == b"P":
        _, timestamp_ms, key_bytes, n = _POINTS.unpack_from(payload)
        at = _POINTS.size + key_bytes
        numbers = struct.unpack(f"<{n or 1}q{n}d", payload[at:])  # none at all is no record, either
        return Points(timestamp_ms, payload[_POINTS.size : at].decode(), numbers[:n], numbers[n:])
    _, timestamp_ms = _CALL.unpack_from(payload)
    arguments = json.loads(payload[_CALL.size :])
    return Call(timestamp_ms, arguments.pop("call"), arguments)
