"""A training configuration: read from the command line, and refused before anything is compiled if it cannot be run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import ml_collections
import optax
from absl import flags
from ml_collections import config_dict, config_flags

from configs.common import training
from experiments.program.refusal import Refused, check_name
from experiments.tasks.catalogue import TASKS, Task
from experiments.training.optimisers import OPTIMISERS
from experiments.training.rules import RULES, Rule

RESULTS = Path("results") / "train"
RULE_OPTIONS = ("segment_length", "rank")
OPTIMISER_OPTIONS = ("clip",)


class Settings(NamedTuple):
    """What a configuration stands for.

    Attributes:
      config: the fields themselves.
      task, rule, optimiser: made from them.
      length: T, steps of a sequence.
      update_every: steps between updates; T for an update at the end of the sequence.
    """

    config: ml_collections.ConfigDict
    task: Task
    rule: Rule
    optimiser: optax.GradientTransformation
    length: int
    update_every: int


def read(arguments: list[str]) -> tuple[ml_collections.ConfigDict, Path]:
    """The configuration and the folder of the run, from ``--config=file --config.field=value ... --workdir=folder``.

    Raises:
      Refused: another argument, no such file, no such field, a value of another type.
    """
    files = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    possible = sorted(path.as_posix() for path in Path("configs").glob("*.py") if path.stem in TASKS)
    if not files:
        raise Refused(f"No configuration given. Needed: --config=FILE, such as {' or '.join(possible)}.")
    if not Path(files[-1]).is_file():
        check_name("configuration file", files[-1], possible)
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    values = _parse([argument for argument in arguments if argument not in overrides])
    config = values.config
    add_defaults(config)
    known = fields(config)
    for override in overrides:
        check_name("field of the configuration", override.removeprefix("--config.").split("=")[0], known)
    config = _parse(overrides, config).config
    return config, Path(values.workdir or RESULTS / Path(files[-1]).stem)


def add_defaults(config: ml_collections.ConfigDict) -> None:
    """Give a configuration all that its file leaves out and that has a default, so that it can be set, and is stored.

    The defaults are those of ``configs/common.py`` and of the functions of the tasks that the file has a section for.
    """
    with config.unlocked():
        for name, field in training().items(preserve_field_references=True):
            if name not in config:
                config[name] = field
        for name in TASKS:
            if not isinstance(config.get(name), ml_collections.ConfigDict):
                continue
            types = get_type_hints(TASKS[name])
            for option, parameter in inspect.signature(TASKS[name]).parameters.items():
                if option not in config[name] and parameter.default is not parameter.empty:
                    config[name][option] = _field(parameter.default, types[option])


def _field(default: Any, annotation: Any) -> Any:
    """A field with a default; where that is None, it takes values of the type that the annotation allows beside it."""
    if default is not None:
        return default
    (kind,) = [kind for kind in get_args(annotation) if kind is not type(None)]
    return config_dict.placeholder(kind)


def _parse(arguments: list[str], config: ml_collections.ConfigDict | None = None) -> flags.FlagValues:
    """The flags; ``config`` stands in for the file, when its fields are to be set."""
    # Flags of its own, not absl's global ones: a process may read several configurations.
    values = flags.FlagValues()
    program = ["train", *arguments]
    if config is None:
        config_flags.DEFINE_config_file("config", None, "file", flag_values=values, sys_argv=program)
    else:
        config_flags.DEFINE_config_dict("config", config, "fields", flag_values=values, sys_argv=program)
    flags.DEFINE_string("workdir", None, "folder", flag_values=values)
    try:
        rest = values(program)[1:]
    except (flags.Error, AttributeError, KeyError, SyntaxError) as error:
        raise Refused(str(error)) from error
    if rest:
        raise Refused(f"Seen {rest[0]!r}; every argument is --config=FILE, --config.FIELD=VALUE or --workdir=FOLDER.")
    return values


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields by name, such as "task" and "digits.blank", with their values."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        found |= fields(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def make(config: ml_collections.ConfigDict) -> Settings:
    """Check a configuration and make what it stands for; nothing is compiled.

    Raises:
      Refused: what cannot be run.
    """
    check_name("task", config.get("task"), TASKS)
    _check_fields(config)
    check_name("rule", config.rule, RULES)
    check_name("optimiser", config.optimiser, OPTIMISERS)
    for name in ("batches", "evaluate_every", "checkpoint_every", "learning_rate", "clip"):
        if config[name] is not None and not 0 < config[name] < math.inf:
            raise Refused(f"{name} must be above 0 and finite; seen {config[name]}.")
    for outer, inner in (("batches", "evaluate_every"), ("checkpoint_every", "evaluate_every")):
        if config[outer] % config[inner]:
            raise Refused(f"{inner} must divide {outer}; seen {config[inner]} and {config[outer]}.")

    try:
        task = TASKS[config.task](**config[config.task])
        xs, _ = jax.eval_shape(lambda: task.sample(jax.random.key(0), 0))
        jax.eval_shape(task.test)  # what the test set cannot give is refused now, not at the first evaluation
        rule_options = _options(config, "rule", RULES, RULE_OPTIONS)
        rule = RULES[config.rule](task.network, task.loss_fn, **rule_options)
    except ImportError as error:
        raise Refused(str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, Refused) else Refused(str(error)) from error
    length = len(xs)
    update_every = length if config.update_every is None else config.update_every
    _check_updates(config.rule, rule.period, update_every, length)

    updates = config.batches * (length // update_every)
    rate = optax.cosine_decay_schedule(config.learning_rate, updates) if config.cosine_decay else config.learning_rate
    optimiser = OPTIMISERS[config.optimiser](rate, **_options(config, "optimiser", OPTIMISERS, OPTIMISER_OPTIONS))
    return Settings(config, task, rule, optimiser, length, update_every)


def _check_fields(config: ml_collections.ConfigDict) -> None:
    """Every field of ``configs/common.py`` and the task's own section with its options, and nothing else."""
    needed = [*training(), config.task]
    if not isinstance(config.get(config.task), ml_collections.ConfigDict):
        raise Refused(
            f"task is {config.task!r}, but the configuration has no section of that name with its options. "
            f"Start from configs/{config.task}.py."
        )
    _check_same_names("field of the configuration", config, needed, needed)
    parameters = inspect.signature(TASKS[config.task]).parameters
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    _check_same_names(f"option of {config.task}", config[config.task], parameters, needed)


def _check_same_names(what: str, seen: Iterable[str], possible: Iterable[str], needed: Iterable[str]) -> None:
    for name in seen:
        check_name(what, name, possible)
    missing = [name for name in needed if name not in seen]
    if missing:
        raise Refused(f"Missing {what}: {', '.join(missing)}.")


def _options(
    config: ml_collections.ConfigDict, field: str, table: Mapping[str, Callable], names: tuple[str, ...]
) -> dict[str, Any]:
    """The options given, each a keyword argument of the function chosen from a table."""
    given = {name: config[name] for name in names if config[name] is not None}
    for name in given:
        if name not in inspect.signature(table[config[field]]).parameters:
            able = [other for other, function in table.items() if name in inspect.signature(function).parameters]
            raise Refused(
                f"{name}={given[name]} was given, but the {field} {config[field]!r} has none. "
                f"Leave it out, or choose one of: {', '.join(able)}."
            )
    return given


def _check_updates(rule: str, period: int | None, update_every: int, length: int) -> None:
    """Pieces of equal length, and nothing that a rule does inside one may straddle two."""
    if update_every < 1 or length % update_every:
        divisors = [str(k) for k in range(1, length + 1) if length % k == 0]
        raise Refused(
            f"update_every={update_every} does not divide the sequence of {length} steps. "
            f"Possible: {', '.join(divisors)}."
        )
    if update_every < length and period is None:
        raise Refused(
            f"update_every={update_every} was given, but {rule!r} has its gradient at the end of the sequence only. "
            f"Leave it out, or give {length}."
        )
    if update_every < length and update_every % period:
        raise Refused(
            f"update_every={update_every} would cut the pieces of {period} steps in which {rule!r} works. "
            f"Give a multiple of {period}, or {length}, or leave it out."
        )
