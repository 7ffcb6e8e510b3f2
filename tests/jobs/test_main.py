"""``rlhf-critic`` as a user types it: the list of commands, help, version, completion and errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_critic
from jobs.cli import COMMANDS
from jobs.main import SHELLS

TOP = Path(__file__).parents[2]


def rlhf_critic_command(*arguments: str, interpreter_options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *interpreter_options, "-m", "jobs.main", *arguments]
    return subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_without_a_command_it_lists_the_commands(arguments):
    finished = rlhf_critic_command(*arguments)
    assert finished.returncode == 0
    listed = re.findall(r"^  (\w+) .*\.$", finished.stdout, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_the_version_is_that_of_the_package():
    assert rlhf_critic_command("--version").stdout == f"rlhf-critic {rlhf_critic.__version__}\n"
    settings = (TOP / "pyproject.toml").read_text().splitlines()
    assert 'version = {attr = "rlhf_critic.__version__"}' in settings
    assert 'rlhf-critic = "jobs.main:main"' in settings


def test_an_unknown_command_is_an_error_with_the_list():
    for arguments in (("trian",), ("--print-completion", "fish")):
        finished = rlhf_critic_command(*arguments)
        assert finished.returncode == 2
        assert finished.stderr.startswith(f"error: unknown command: {' '.join(arguments)}\n")
        assert "  train " in finished.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_ray(option):
    finished = rlhf_critic_command(option, interpreter_options=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "rlhf_critic" in imported
    assert not {name for name in imported if name.split(".")[0] in {"torch", "ray", "transformers", "pydantic", "tyro"}}


def test_a_command_is_the_module_of_its_name():
    name, module = "inspect", "jobs.inspect_data"
    by_command = rlhf_critic_command(name, "--help")
    by_module = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=TOP, capture_output=True, text=True, check=False, timeout=120
    )
    assert by_command.returncode == by_module.returncode == 0
    assert by_command.stdout.startswith(f"usage: rlhf-critic {name} ")
    assert by_module.stdout.startswith(f"usage: python -m {module} ")
    assert by_command.stdout.splitlines()[1:] == by_module.stdout.splitlines()[1:]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_and_options(shell):
    script = rlhf_critic_command("--print-completion", shell).stdout
    assert "storage-path" in script
    if shell != "bash":
        return
    complete = """
COMP_WORDS=(rlhf-critic "$@"); COMP_CWORD=$#
$(complete -p rlhf-critic | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${COMPREPLY[@]}"
"""
    for typed, completed in ((["tr"], "train"), (["serve", "--po"], "--port"), (["plan", "--world"], "--world-size")):
        found = subprocess.run(
            ["bash", "-c", script + complete, "bash", *typed], capture_output=True, text=True, check=True, timeout=60
        )
        assert found.stdout.strip() == completed
