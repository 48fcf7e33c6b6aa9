"""The folder of one training run: its configuration, metrics, timings and checkpoints.

A line of metrics is written before the checkpoint of the same batch, and a checkpoint appears as a whole or not at
all. So after a kill at any moment the newest checkpoint and the lines up to its batch are a run that was never killed.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

try:
    import orbax.checkpoint as orbax
except ImportError as error:
    raise ImportError("Checkpoints need orbax: pip install -e '.[experiments]'") from error

PyTree = Any
KEPT_CHECKPOINTS = 3
COMMITS = "commits"


class OtherConfig(ValueError):
    """The folder belongs to a run of another configuration."""


class InUse(RuntimeError):
    """Another program is writing into the folder."""


class Workdir:
    """Opened for one configuration, as a dictionary that JSON can hold, by one program at a time.

    Args:
      read_only: to read checkpoints alone; nothing is changed, so a run may go on meanwhile.

    Raises:
      OtherConfig: it holds a run of another configuration.
      InUse: a run goes on in it.
    """

    def __init__(self, path: Path, config: dict[str, Any], read_only: bool = False) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if read_only:
            options = orbax.CheckpointManagerOptions(read_only=True)
            self._checkpoints = orbax.CheckpointManager((path / "checkpoints").absolute(), options=options)
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        try:
            config = json.loads(json.dumps(config))
            stored = path / "config.json"
            if stored.exists():
                _check_same(path, json.loads(stored.read_text()), config)
            else:
                _write(stored, json.dumps(config, indent=2, sort_keys=True) + "\n")
            options = orbax.CheckpointManagerOptions(
                max_to_keep=KEPT_CHECKPOINTS, cleanup_tmp_directories=True, enable_async_checkpointing=False
            )
            self._checkpoints = orbax.CheckpointManager((path / "checkpoints").absolute(), options=options)
        except BaseException:
            self._lock.close()
            raise

    def trained_at(self, commit: str) -> None:
        """Keep the commit of the program that begins the run or goes on with it."""
        kept = commits(self.path)
        if commit not in kept:
            _write(self.path / COMMITS, "".join(f"{one}\n" for one in [*kept, commit]))

    def newest(self) -> int | None:
        """The batch of the newest checkpoint."""
        return self._checkpoints.latest_step()

    def save(self, batch: int, state: PyTree) -> None:
        """Write a checkpoint, and wait for it."""
        self._checkpoints.save(batch, args=orbax.args.StandardSave(state))
        self._checkpoints.wait_until_finished()

    def restore(self, batch: int, like: PyTree) -> PyTree:
        """A checkpoint, in the structure of ``like``, whose leaves are shapes and dtypes."""
        return self._checkpoints.restore(batch, args=orbax.args.StandardRestore(like))

    def append(self, name: str, line: dict[str, Any]) -> None:
        """One line more in ``metrics.jsonl`` or ``timings.jsonl``; on the disk when this returns."""
        with (self.path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What ``metrics.jsonl`` or ``timings.jsonl`` holds."""
        return whole_lines(self.path / f"{name}.jsonl")

    def truncate(self, batch: int | None) -> None:
        """Drop the lines after a batch, all of them for None: what a killed run wrote after its last checkpoint."""
        last = -1 if batch is None else batch
        for name in ("metrics", "timings"):
            kept = [line for line in self.lines(name) if line["batch"] <= last]
            _write(self.path / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        """Nothing may be written afterwards."""
        try:
            self._checkpoints.close()
        finally:
            if self._lock is not None:
                self._lock.close()


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file; none where there is no such file. The last line of a killed run may have been cut short."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def commits(path: Path) -> list[str]:
    """At which the run of a folder was trained: one, or several where it was interrupted."""
    return (path / COMMITS).read_text().split() if (path / COMMITS).exists() else []


def _locked(path: Path) -> IO[str]:
    """A file that one program can hold; the system lets go of it when that program ends, however it ends."""
    lock = (path / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InUse(
            f"{path} is in use by another training program. Wait for it to end, or give another --workdir."
        ) from None
    return lock


def _write(path: Path, text: str) -> None:
    """As a whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _check_same(path: Path, stored: dict[str, Any], seen: dict[str, Any]) -> None:
    stored, seen = _flat(stored), _flat(seen)
    differences = [
        f"  {name}: there {stored.get(name, 'missing')!r}, here {seen.get(name, 'missing')!r}"
        for name in sorted(stored.keys() | seen.keys())
        if name not in stored or name not in seen or stored[name] != seen[name]
    ]
    if differences:
        raise OtherConfig(
            "\n".join([f"{path} holds a run of another configuration:", *differences, "Give another --workdir."])
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
