"""The folder of a run: one configuration, one program at a time, the commits of those that trained in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.program.commit import commit
from experiments.training import train
from experiments.training.workdir import InUse, OtherConfig, Workdir, commits

HOLDER = """
import sys
from pathlib import Path
from experiments.training.workdir import Workdir

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


def test_a_folder_keeps_the_commits_that_trained_in_it(tmp_path: Path) -> None:
    for one in ("aaa", "bbb", "bbb"):
        workdir = Workdir(tmp_path, {})
        workdir.trained_at(one)
        workdir.close()
    assert commits(tmp_path) == ["aaa", "bbb"]


def test_a_commit_is_that_of_the_sources(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        names = {f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(["git", *words], cwd=tmp_path, env=os.environ | names, check=True, capture_output=True)

    for folder in ("experiments", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "docs" / "file").write_text("a result")
    commit.cache_clear()
    assert commit(tmp_path) == clean
    (tmp_path / "experiments" / "file").write_text("2")
    commit.cache_clear()
    assert commit(tmp_path) == f"{clean}-dirty"


def test_training_without_its_packages_says_how_to_get_them() -> None:
    program = "import sys; sys.modules['ml_collections'] = None; import experiments.training.__main__"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode and "pip install -e '.[experiments]'" in run.stderr.splitlines()[-1]
