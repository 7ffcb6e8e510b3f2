"""What all commands share: errors as one message and an exit code, instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf_critic.errors import ConfigError, CriticError

EXIT_FAILED = 1
EXIT_REFUSED = 2
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)  # a disk, or what a user may have of it
# Where Ray unpacks the working directory of a submitted job.
RAY_PACKAGE_FOLDER = "working_dir_files"


def run_job(main: Callable[[], None], *also_expected: type[Exception]) -> None:
    """Runs a command's ``main`` and exits.

    The exit code is 0 when all went well, 2 when our own error says what the user should change, 1 for an expected
    failure of the system below (``also_expected``). Anything else is a bug and keeps its traceback.
    """
    # Ray, transformers and datasets report usage unless told not to; a training job should not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        main()
    except CriticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except also_expected as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        print(f"failed: {error}. Free some space; a run that was begun goes on with --resume", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def validate_outside_package(option: str, path: str) -> None:
    """Refuses to write into the copy of the working directory that Ray makes for a submitted job.

    Args:
        option: As the user gave it.
        path: Its value, a path or URI.

    Raises:
        ConfigError: The path is relative and this is such a copy, which Ray deletes when it likes.
    """
    if "://" not in path and not os.path.isabs(path) and RAY_PACKAGE_FOLDER in Path.cwd().parts:
        flag = option.replace("_", "-")
        raise ConfigError(
            f"{option} {path!r} is relative, and a submitted job runs in a copy of the working directory that Ray may "
            f"delete: give {flag} an absolute path or a URI"
        )
