"""Any error is described as a typed one, with an exit code, a place and its traceback."""

import errno
import pickle

import pytest
import torch

from rlhf_critic.errors import CheckpointError, ConfigError, CriticError, DataError, UnexpectedError, describe_error
from rlhf_critic.files import write_text_atomically

ERRORS = {
    "ours": (DataError("d.jsonl:3"), DataError, 2, "d.jsonl:3"),
    "gpu memory": (torch.OutOfMemoryError("tried to get 2 GiB"), ConfigError, 2, "out of memory: tried to get 2 GiB"),
    "host memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ConfigError, 2, "plan calculates"),
    "full disk": (OSError(errno.ENOSPC, "No space left", "m"), CheckpointError, 2, "No space left: 'm'"),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        ConfigError,
        2,
        "/x: Permission denied",
    ),
    "a package": (ModuleNotFoundError("No module named 'x'"), ConfigError, 2, "No module named 'x'. Install it"),
    "a broken disk": (OSError(errno.EIO, "Input/output error"), UnexpectedError, 1, "OSError"),
    "a bug": (ZeroDivisionError("by zero"), UnexpectedError, 1, "ZeroDivisionError"),
    "nothing to say": (AssertionError(), UnexpectedError, 1, "no message"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_every_error_has_a_class_an_exit_code_and_a_message(what):
    raised, kind, exit_code, text = ERRORS[what]
    try:
        raise raised
    except Exception as error:
        described = describe_error(error)
    assert type(described) is kind
    assert described.exit_code == exit_code
    assert text in str(described)
    assert "test_errors.py" in described.trace
    again: CriticError = pickle.loads(pickle.dumps(described))
    assert (str(again), again.trace, again.exit_code) == (str(described), described.trace, exit_code)


def test_the_place_is_the_innermost_line_of_this_project():
    with pytest.raises(AttributeError) as raised:
        write_text_atomically(None, "")  # type: ignore[arg-type]
    assert str(describe_error(raised.value)).startswith("AttributeError at rlhf_critic/files.py:")


def test_a_long_message_is_cut_in_the_middle():
    described = describe_error(ValueError("begin\n" + "x" * 5000 + " end"))
    assert len(str(described)) < 600
    assert "begin" in str(described)
    assert str(described).endswith("end")
    assert "\n" not in str(described)


def test_of_a_traceback_in_a_message_the_last_line_is_shown():
    text = "The actor died.\nTraceback (most recent call last):\n  File x\nValueError: no such option\n"
    described = describe_error(RuntimeError(text))
    assert "Traceback" not in str(described)
    assert str(described).endswith("ValueError: no such option")
