"""``rlhf-critic COMMAND``: one entry point for all jobs. Knows nothing about what a job does.

``rlhf-critic train ...`` is the same as ``python -m jobs.train ...``. This module imports neither torch nor Ray, so
``--help`` and ``--version`` take a fraction of a second.
"""

from __future__ import annotations

import runpy
import sys
from typing import Annotated, Any, Union

import rlhf_critic
from jobs.cli import COMMANDS, DEBUG_OPTION, EXIT_REFUSED, SCRIPT
from rlhf_critic.logs import LEVEL_VARIABLE

SHELLS = ("bash", "zsh")
USAGE = f"""usage: {SCRIPT} COMMAND [OPTIONS]

{{commands}}

  {SCRIPT} COMMAND --help             list the options of a command
  {SCRIPT} --version                  print the version
  {SCRIPT} --print-completion SHELL   print a completion script for {" or ".join(SHELLS)}, for example
                                        source <({SCRIPT} --print-completion bash)
  {SCRIPT} COMMAND {DEBUG_OPTION}            show all log lines, and the traceback of an error
  {LEVEL_VARIABLE}=WARNING       environment variable: show fewer log lines, or more with DEBUG
"""


def main() -> None:
    """Runs the command that is named first on the command line."""
    match sys.argv[1:]:
        case [] | ["--help" | "-h", *_]:
            print(usage())
        case ["--version", *_]:
            print(f"{SCRIPT} {rlhf_critic.__version__}")
        case ["--print-completion", shell] if shell in SHELLS:
            print_completion(shell)
        case [name, *arguments] if name in COMMANDS:
            sys.argv = [f"{SCRIPT} {name}", *arguments]
            runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=False)
        case unknown:
            print(f"error: unknown command: {' '.join(unknown)}\n\n{usage()}", file=sys.stderr)
            sys.exit(EXIT_REFUSED)


def usage() -> str:
    """Lists the commands, one line each."""
    return USAGE.format(commands="\n".join(f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()))


def print_completion(shell: str) -> None:
    """Prints a script that completes commands and options in a shell."""
    import tyro

    configs = (
        Annotated[command.config_class(), tyro.conf.subcommand(name, prefix_name=False)]
        for name, command in COMMANDS.items()
    )
    all_commands: Any = Union[tuple(configs)]  # noqa: UP007
    tyro.cli(all_commands, prog=SCRIPT, args=["--tyro-print-completion", shell])


if __name__ == "__main__":
    main()
