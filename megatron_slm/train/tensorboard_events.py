"""Scalars for TensorBoard, without torch: one event a step holds all tags, which costs a tenth of one event a tag."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

VERSUS_SAMPLES = " vs samples"

# Framing of an event file (TFRecord): length of the event, checksum of the length, the event, checksum of the event.
HEADER = struct.Struct("<QI")
FOOTER_BYTES = 4


class TensorBoardScalars:
    """Appends to a directory of events. A resumed run adds a file, and no step is in two of them."""

    def __init__(self, directory: Path, step: int) -> None:
        """Cut what is recorded after ``step`` completed steps and go on from there."""
        for file in sorted(directory.glob("events.out.tfevents.*")):
            truncate_events(file, step)
        self._writer = EventFileWriter(str(directory))

    def write(self, scalars: Mapping[str, float], *, step: int, consumed_samples: int) -> None:
        """Add every tag at ``step``, and again as ``<tag> vs samples`` at ``consumed_samples``."""
        self._add(scalars, step)
        self._add({tag + VERSUS_SAMPLES: value for tag, value in scalars.items()}, consumed_samples)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()

    def _add(self, scalars: Mapping[str, float], position: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=position, summary=Summary(value=values)))


def truncate_events(file: Path, last_step: int) -> None:
    """Cut everything from the first event after ``last_step`` on, and an event that a crash has torn.

    TensorBoard's own way, to begin a session at a step, drops points of every tag at or after this number, so it would
    also drop the ``vs samples`` points of the steps before, whose number is that of the samples.
    """
    data = file.read_bytes()
    end = 0
    while end + HEADER.size <= len(data):
        length, _ = HEADER.unpack_from(data, end)
        start, stop = end + HEADER.size, end + HEADER.size + length
        if length == 0 or stop + FOOTER_BYTES > len(data):
            break
        try:
            event = Event.FromString(data[start:stop])
        except DecodeError:
            break
        counts_steps = any(not value.tag.endswith(VERSUS_SAMPLES) for value in event.summary.value)
        if counts_steps and event.step > last_step:
            break
        end = stop + FOOTER_BYTES
    with file.open("r+b") as stream:
        stream.truncate(end)
