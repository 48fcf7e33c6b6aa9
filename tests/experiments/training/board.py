"""What TensorBoard would show of a run."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of every event of a folder, in order; its files are TFRecords."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])  # between two checksums of four bytes
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found
