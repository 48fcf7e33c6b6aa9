"""A configuration file may leave out what has a default; what it leaves out can be set, and is stored."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import ml_collections
import pytest

from experiments.program.refusal import Refused
from experiments.tasks.catalogue import TASKS
from experiments.training import settings, train

TEXT = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"task": "text", "text": {"size": 32, "features": 4, "batch": 2, "steps": 4}})
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A configuration with nothing but the task and its options without a default."""
    path = tmp_path / "short.py"
    path.write_text(TEXT)
    return f"--config={path}"


@pytest.mark.mixed_promotion
def test_what_a_file_leaves_out_has_its_default(file: str):
    config, _ = settings.read([file])
    common = import_module("configs.text").training().to_dict()
    options = {"path": None, "cell": "GRUCell", "layers": 2, "size": 32, "features": 4, "batch": 2, "steps": 4}
    assert config.to_dict() == common | {"task": "text", "text": options}
    assert settings.make(config).length == 4


@pytest.mark.mixed_promotion
def test_what_a_file_leaves_out_can_be_set(file: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 200)
    fields = {"text.layers": 1, "text.cell": "SimpleCell", "text.path": str(text), "clip": 2, "seed": 5}
    fields |= {"optimiser": "sgd", "segment_length": 2, "cosine_decay": False}
    config, _ = settings.read([file, *(f"--config.{name}={value}" for name, value in fields.items())])
    assert {name: settings.fields(config)[name] for name in fields} == fields
    assert settings.make(config).rule.period == 2


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.text.layer=1", "Did you mean 'text.layers'"),
        ("--config.text.layers=two", "two"),
        ("--config.digits.layers=1", "No field"),
    ],
)
def test_what_is_wrong_is_still_refused(file: str, argument: str, message: str):
    with pytest.raises(Refused, match=message):
        settings.read([file, argument])


def test_a_task_without_a_section_is_refused():
    config = ml_collections.ConfigDict({"task": "text", "text": 3})
    settings.add_defaults(config)
    with pytest.raises(Refused, match=r"Start from configs/text\.py"):
        settings.make(config)


def test_files_that_leave_nothing_out_are_as_they_were():
    """So that the folders of their runs still belong to them."""
    for name in TASKS:
        config, _ = settings.read([f"--config=configs/{name}.py"])
        assert config.to_dict() == import_module(f"configs.{name}").get_config().to_dict()


def test_help_shows_every_field_with_its_value(file: str, capsys):
    assert train.main([file, "--config.text.layers=3", "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "--config.text.layers=3" in shown and "--config.text.cell=GRUCell" in shown and "--config.seed=0" in shown
