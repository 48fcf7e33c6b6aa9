"""A set of recordings for all that reads one."""

from pathlib import Path

import pytest

from experiments.tasks import series

HEAD = "# a comment\n@problemName small\n@equalLength true\n@classLabel true low high\n@data\n"
TRAIN = HEAD + "1,2,3:0,0,6:low\n3,4,5:6,0,0:high\n5,6,7:0,6,0:high\n\n"
TEST = HEAD + "1,2,3:0,0,6:high\n"


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files as aeon has them, each three recordings of two channels and three steps."""
    for name, stem in series.SETS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{stem}_TRAIN.ts").write_text(TRAIN)
        (tmp_path / name / f"{stem}_TEST.ts").write_text(TEST)
    monkeypatch.setattr(series, "folder", lambda: tmp_path)
    return tmp_path
