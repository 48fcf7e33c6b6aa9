"""The folder of a run belongs to one configuration, and to one program at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.workdir import InUse, OtherConfig, Workdir

HOLDER = """
import sys
from pathlib import Path
from experiments.workdir import Workdir

workdir = Workdir(Path(sys.argv[1]), {})
print("open", flush=True)
sys.stdin.read()
"""


def test_a_folder_of_another_configuration_is_refused_with_the_fields(tmp_path: Path) -> None:
    Workdir(tmp_path, {"rule": "BPTT", "task": {"delay": 3}, "seed": 0}).close()
    Workdir(tmp_path, {"rule": "BPTT", "task": {"delay": 3}, "seed": 0}).close()
    with pytest.raises(OtherConfig) as error:
        Workdir(tmp_path, {"rule": "BPTT", "task": {"delay": 4}, "seed": 0, "rank": 1})
    assert str(error.value).splitlines()[1:-1] == [
        "  rank: there 'missing', here 1",
        "  task.delay: there 3, here 4",
    ]


def test_a_folder_in_use_is_refused_until_its_program_ends(tmp_path: Path, capsys) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(InUse, match="in use by another training program"):
            Workdir(tmp_path, {})
        assert train.main(["--config=configs/xor_count.py", f"--workdir={tmp_path}"]) == 2
        assert "give another --workdir" in capsys.readouterr().err
        other.kill()
    Workdir(tmp_path, {}).close()


def test_a_folder_that_was_refused_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:  # keeps the failed call, and what it opened, alive
        Workdir(tmp_path, {})
    (tmp_path / "config.json").unlink()
    Workdir(tmp_path, {}).close()
    assert error
