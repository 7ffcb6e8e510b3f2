"""Log output of one process: levels, timestamps and one handler. Knows nothing about what is logged.

Results that a user asked for go to standard output. Events, warnings and errors go through `logging` to standard
error: coloured by rich on a terminal, plain lines elsewhere (a file, a pipe, a Ray worker).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from rlhf_critic.errors import ConfigError

LEVEL_VARIABLE = "RLHF_CRITIC_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
PACKAGES = ("rlhf_critic", "actors", "jobs", "__main__")  # the last is a job that was started by python -m
# Libraries that report their start-up at WARNING or INFO.
NOISY_LIBRARIES = ("DeepSpeed", "deepspeed", "ray", "ray.train", "ray.serve")


class _StandardError(logging.StreamHandler):  # without a parameter, which Python 3.10 does not take
    """A handler that writes to the standard error of the moment, which tests and notebooks replace."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def configure_logging(level: str | None = None, *, quiet_libraries: bool = True) -> None:
    """Sends the log records of this project to standard error. Repeated calls only change the level.

    Args:
        level: Name of the lowest level that is shown, such as ``DEBUG``. Default: the environment variable
            ``RLHF_CRITIC_LOG_LEVEL``, else ``INFO``. With ``DEBUG``, libraries are shown as well.
        quiet_libraries: Whether libraries log errors only. A Serve replica passes False, to keep Serve's access log.

    Raises:
        ConfigError: There is no such level.
    """
    name = (level or os.environ.get(LEVEL_VARIABLE) or "INFO").upper()
    if name not in LEVELS:
        raise ConfigError(f"log level {name!r} is unknown; use one of {', '.join(LEVELS)}")
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(name)
        if not logger.handlers:
            logger.addHandler(_handler())
    if quiet_libraries and name != "DEBUG":
        for library in NOISY_LIBRARIES:
            logging.getLogger(library).setLevel(logging.ERROR)
            logging.getLogger(library).addFilter(_errors_only)  # DeepSpeed sets its own level when it is imported


def quiet_root_handlers() -> None:
    """Keeps the root logger's console from showing this project's records twice, and events of libraries.

    Ray Train installs a console on the root logger of its workers. Its files still get every record.
    """
    for handler in logging.getLogger().handlers if not shows_debug() else ():
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(_is_warning_of_a_library)


def _is_warning_of_a_library(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and record.name.partition(".")[0] not in PACKAGES


def level_of_libraries() -> str:
    """Returns the level from which libraries log: ``ERROR``, or ``INFO`` where this project logs at ``DEBUG``."""
    return "INFO" if shows_debug() else "ERROR"


def shows_debug() -> bool:
    """Returns whether this project logs at ``DEBUG``, where errors come with their tracebacks."""
    return os.environ.get(LEVEL_VARIABLE, "").upper() == "DEBUG"


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
