"""Processes on this machine that work together: started, watched, and ended together."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

from experiments.program.refusal import Refused

SHOWN = 12
"""Lines of a process that died that are shown."""


def free_port(port: int | None) -> int:
    """A port that nobody listens on: this one, or any.

    Raises:
      Refused: it is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise Refused(
                f"Port {port} of this machine cannot be used: {error.strerror}. Give another --port, or none: a free "
                f"one is then taken."
            ) from error
        return listener.getsockname()[1]


def reach(address: str, timeout: float) -> None:
    """Wait until somebody listens at host:port.

    Raises:
      OSError: nobody does within so many seconds.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(f"nobody listens at {address} ({error})") from error
            time.sleep(0.2)


def run_together(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Run all commands at once until all have ended; where one fails the others are ended too.

    Returns:
      0, or the exit status of the one that failed first, of which the last lines have been shown.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile(mode="w+")) for _ in commands]
        pairs = zip(commands, logs, strict=True)
        started = [subprocess.Popen(command, env=dict(environment), stderr=log) for command, log in pairs]
        stack.callback(_end, started)
        while True:
            ended = [process.poll() for process in started]
            failed = [number for number, status in enumerate(ended) if status]
            if failed:
                _tell(failed[0], len(commands), ended[failed[0]], logs[failed[0]])
                return ended[failed[0]] or 1
            if None not in ended:
                return 0
            time.sleep(0.1)


def _end(started: Sequence[subprocess.Popen]) -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def _tell(number: int, count: int, status: int | None, log: IO[str]) -> None:
    log.seek(0)
    last = "".join(log.readlines()[-SHOWN:])
    how = f"was ended by signal {-status}" if status and status < 0 else f"ended with status {status}"
    print(f"{last}error: process {number} of {count} {how}; the others were ended too.", flush=True)
