"""What all commands share: errors as one message and an exit code, instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rlhf_critic.errors import CriticError

EXIT_FAILED = 1
EXIT_REFUSED = 2


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
