"""The write-ahead file: buffer, outage spool and replay filter of one run in one append-only file.

A record is `length, CRC, payload`; it is written by one system call, so a killed process loses
nothing that was logged. What a crash leaves half-written at the end is cut off at the next open.
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

_HEAD = struct.Struct("<II")  # length and CRC-32 of the payload
_POINTS = struct.Struct("<cqHI")  # kind, timestamp, bytes of the key, number of points
_CALL = struct.Struct("<cq")  # kind, timestamp


@dataclass(frozen=True, slots=True)
class Points:
    """Values of one metric at some steps, with the one timestamp that all of them keep."""

    timestamp_ms: int
    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Something else that MLflow is to be told, in its turn: parameters, tags, a status."""

    timestamp_ms: int
    name: str
    arguments: dict[str, Any]


Record = Points | Call


class WriteAhead:
    """The file, open for appending; whoever opens it holds the run's lock.

    Attributes:
        end: Bytes of whole records, so far.
        sent: Bytes that MLflow has confirmed. May lag behind after a crash: sending a point again
            with its own timestamp changes nothing.
        damaged: Whether MLflow had confirmed more than the file still holds.
        highest: Highest step of each key as of opening; points at or below it are skipped.
        last_status: Argument of the last `status` call in the file, or None.
    """

    def __init__(self, path: Path):
        self.path = path
        self.end = 0
        self.sent = 0
        self.highest: dict[str, int] = {}
        self.last_status: str | None = None
        self._last_ms = 0
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        confirmed = self._read_confirmed()
        for record, end in read(path):
            self.end = end
            if end == confirmed:
                self.sent = end
            self._last_ms = record.timestamp_ms
            if isinstance(record, Points):
                step = max(record.steps)
                self.highest[record.key] = max(step, self.highest.get(record.key, step))
            elif record.name == "status":
                self.last_status = record.arguments["status"]
        self.damaged = confirmed > self.end
        if os.fstat(self._fd).st_size > self.end:
            os.ftruncate(self._fd, self.end)

    def add_points(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Append the points of `key` that lie beyond the highest step known at opening.

        Args:
            key: The metric.
            steps: One for each value, within 64 bits.
            values: Stored as doubles, bit for bit; NaN and infinities included.

        Raises:
            RunFailed: The disk does not take the record; the file stays as it was.
        """
        floor = self.highest.get(key)
        if floor is not None:
            kept = [i for i, step in enumerate(steps) if step > floor]
            steps, values = [steps[i] for i in kept], [values[i] for i in kept]
        n = len(steps)
        if not n:
            return
        name = key.encode()
        body = name + struct.pack(f"<{n}q", *steps) + struct.pack(f"<{n}d", *values)
        with self._lock:
            self._append(_POINTS.pack(b"P", self._now_ms(), len(name), n) + body)

    def add_call(self, call: str, /, **arguments: Any) -> None:
        """Append a call; `arguments` are JSON values.

        Raises:
            RunFailed: The disk does not take the record; the file stays as it was.
        """
        body = json.dumps({"call": call} | arguments).encode()
        with self._lock:
            self._append(_CALL.pack(b"C", self._now_ms()) + body)
            if call == "status":
                self.last_status = arguments["status"]

    def _now_ms(self) -> int:
        # A clock that jumps backwards must not put a later point before an earlier one.
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms

    def _append(self, payload: bytes) -> None:
        record = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            reason = "the file system took only a part"
            whole = os.write(self._fd, record) == len(record)
        except OSError as error:
            whole, reason = False, error.strerror
        if not whole:
            with contextlib.suppress(OSError):  # what cannot be cut now is cut at the next open
                os.ftruncate(self._fd, self.end)
            raise RunFailed(f"cannot write {len(record)} bytes to {self.path}: {reason}")
        self.end += len(record)

    def sync(self) -> None:
        """Return once all that was appended is on the disk."""
        os.fsync(self._fd)

    def confirm(self, at: int) -> None:
        """Remember beside the file that MLflow has everything before offset `at`."""
        self.sent = at
        with contextlib.suppress(OSError):  # then it lags behind, which is harmless
            self._sent_path.write_text(f"{at}\n")

    def _read_confirmed(self) -> int:
        try:
            return int(self._sent_path.read_text())
        except (OSError, ValueError):
            return 0

    @property
    def _sent_path(self) -> Path:
        return self.path.with_suffix(".sent")

    def close(self) -> None:
        """Close the file; nothing is lost by not calling this."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1  # another file may get its number


def read(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[Record, int]]:
    """The records between two offsets, each with the offset where it ends.

    Ends at the first record that is not whole. `start` is the end of a record, or zero.
    """
    with path.open("rb") as file:
        file.seek(start)
        while stop is None or start < stop:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            length, crc = _HEAD.unpack(head)
            payload = file.read(length)
            if len(payload) < max(length, _CALL.size) or zlib.crc32(payload) != crc:
                return
            start += _HEAD.size + length
            yield _parse(payload), start


def _parse(payload: bytes) -> Record:
    if payload[:1] == b"P":
        _, timestamp_ms, key_bytes, n = _POINTS.unpack_from(payload)
        at = _POINTS.size + key_bytes
        key = payload[_POINTS.size : at].decode()
        steps = struct.unpack_from(f"<{n}q", payload, at)
        return Points(timestamp_ms, key, steps, struct.unpack_from(f"<{n}d", payload, at + 8 * n))
    _, timestamp_ms = _CALL.unpack_from(payload)
    arguments = json.loads(payload[_CALL.size :])
    return Call(timestamp_ms, arguments.pop("call"), arguments)
