"""Types of options, and their parsing from a YAML file and the command line.

A config file has the sections of a job as its top-level keys. On the command line the same options are dotted
(``--train.learning-rate 1e-5``) and override the file. Knows nothing about what the options do.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from tyro.constructors import PrimitiveConstructorSpec

from rlhf_critic.errors import ConfigError
from rlhf_critic.files import read_text

NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# USER:PASSWORD@ of any URI, and the key parameters of Arrow's file systems.
SECRET_IN_URI = re.compile(
    r"^(?:(?:https?|ftp)://[^/?#\s]*:[^/?#\s]*@"  # but not HOST:PORT/PATH@
    r"|(?!https?:|ftp:)[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]*:[^?#\s]*@"  # an unquoted key may have a slash
    r"|[A-Za-z][A-Za-z0-9+.-]*://.*[?&](?:access|secret)_key=)"
)


def shown_path(path: str) -> str:
    """Shortens an absolute path below the working directory to a relative one, as a user would type it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray may delete the working directory of a submitted job before it ends
        return path
    return os.path.relpath(path) if os.path.isabs(path) and Path(path).is_relative_to(here) else path


def absolute_path(path: str) -> str:
    """Makes a local path absolute and expands ``~``; a URI and an empty string stay as they are."""
    return path if "://" in path or not path else os.path.abspath(os.path.expanduser(path))


def _absolute_if_local(name: str) -> str:
    """Makes a path absolute, also of a file that is not there yet; a hub id stays as it is."""
    is_path = name.startswith((".", "/", "~")) or Path(name).exists()
    return absolute_path(name) if is_path else name


def _absolute_source(source: str) -> str:
    """Makes a path absolute that may end in ``:SPLIT``, as `_absolute_if_local` does."""
    is_directory = "://" not in source and Path(re.sub(r":\w+$", "", source)).is_dir()
    return absolute_path(source) if is_directory else _absolute_if_local(source)


def _as_tuple(sources: Any) -> Any:
    return (sources,) if isinstance(sources, str) else () if sources is None else sources


def _each_once(sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    _reject_secrets(str(info.field_name), sources)  # before an error that shows the value
    if len(set(sources)) < len(sources):
        raise ValueError("names a source twice; name each source once")
    return sources


def _one_path_component(name: str) -> str:
    if not name or name in {".", ".."} or any(character in name for character in "/\\"):
        raise ValueError("must be a single directory name")
    return name


def _reject_secrets(option: str, texts: Iterable[object]) -> None:
    if any(isinstance(text, str) and SECRET_IN_URI.search(text) for text in texts):
        # Not a ValueError, with which pydantic would show the value.
        raise ConfigError(
            f"{option}: a URI with a password or key in it, which would be written into checkpoints and logs; leave it "
            "out and set the environment variables of the storage's own tools instead (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY for s3://)"
        )


# Paths are absolute in memory, because actors may have another working directory than the driver. --help shows those
# below the working directory as relative ones. A section whose default has a path needs a default_factory, so that the
# path follows the working directory of the moment.
AS_TYPED = PrimitiveConstructorSpec[str](
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda path: [shown_path(path)],
)
PathOrUri = Annotated[str, AfterValidator(absolute_path), AS_TYPED]
ModelPath = Annotated[str, AfterValidator(_absolute_if_local), AS_TYPED]  # or a hub id, which stays as it is
Source = Annotated[str, AfterValidator(_absolute_source), AS_TYPED]
Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_tuple), AfterValidator(_each_once)]
RunName = Annotated[str, AfterValidator(_one_path_component)]


class Section(BaseModel):
    """A group of options. Unknown names, NaN and infinity are rejected.

    The docstring below an option is its description in ``--help`` and docs/options.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects secrets, because options are written into checkpoints, histories and logs."""
        texts = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        _reject_secrets(str(info.field_name), texts)
        return value


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def changed_options(before: BaseModel, after: BaseModel, ignore: Sequence[str] = ()) -> list[str]:
    """Lists the options that differ between two configs, as ``section.option: old -> new``.

    Args:
        before: The earlier config. Options that its file did not have count as their default values.
        after: The later config.
        ignore: Options that may differ, such as ``model.path``, and whole sections, such as ``run.``.
    """
    old, new = (dict(_flat(config.model_dump(mode="json"))) for config in (before, after))
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not any(name == one or (one.endswith(".") and name.startswith(one)) for one in ignore)
    ]


def validate_same_options(run: str, before: BaseModel, after: BaseModel, ignore: Sequence[str]) -> None:
    """Checks that a run is resumed with the options it began with; see `changed_options`.

    Raises:
        ConfigError: Names the options that differ.
    """
    if changed := changed_options(before, after, ignore):
        raise ConfigError(
            f"the run {run!r} cannot continue with other options: {'; '.join(changed)}. Restore them, or start a run "
            "with another --run.name"
        )


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parse_command_line(config_class: type[ConfigT], arguments: Sequence[str] | None = None, prog: str = "") -> ConfigT:
    """Reads ``--config FILE.yaml`` and dotted options into a config. Options override the file.

    Args:
        config_class: A pydantic model of sections and options.
        arguments: Command-line arguments; by default those of this process.
        prog: The command as a user types it, for ``--help``.

    Raises:
        ConfigError: The file cannot be read, or an option in it is unknown or out of range.
        SystemExit: The command line is wrong (exit code 2) or has ``--help``; raised by tyro.
    """
    only_config = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", metavar="FILE.yaml")
    known, remaining = only_config.parse_known_args(arguments)
    purpose = inspect.cleandoc(config_class.__doc__ or "")
    return tyro.cli(
        config_class,
        args=remaining,
        default=load_config_file(config_class, known.config) if known.config else tyro.MISSING_NONPROP,
        prog=prog or None,
        description=f"{purpose}\n\n--config FILE.yaml sets options from a file; options on the command line override "
        "it.",
    )


def load_config_file(config_class: type[ConfigT], path: str) -> ConfigT:
    """Reads and validates a YAML config file.

    Raises:
        ConfigError: The file is wrong; the message names file, line and option.
    """
    try:
        text = read_text(path)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"{path}:{_line_of(tree, first['loc'])}: {option}: {first['msg']} (got {first['input']!r})"
        ) from error


def _line_of(tree: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """Returns the line (from 1) of the deepest key or list entry of ``location`` that the file has."""
    line, node = 1, tree
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            # A part that is not a key names the member of a union that pydantic tried.
            for key, value in node.value:
                if key.value == part:
                    line, node = key.start_mark.line + 1, value
                    break
    return line
