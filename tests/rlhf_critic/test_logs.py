import io
import logging
import subprocess
import sys

import pytest

from rlhf_critic.errors import ConfigError
from rlhf_critic.logs import LEVEL_VARIABLE, configure_logging, quiet_root_handlers

PROGRAM = """
import logging
from rlhf_critic.errors import ConfigError
from rlhf_critic.logs import configure_logging
configure_logging()
configure_logging()
logging.getLogger("actors.training.worker").info("resumed step=15")
logging.getLogger("jobs.train").debug("hidden")
logging.getLogger("ray").warning("noise")
print("the result")
"""


@pytest.fixture(autouse=True)
def untouched_loggers():
    before = {name: logging.getLogger(name).level for name in ("rlhf_critic", "actors", "jobs", "ray")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_events_are_plain_timed_lines_on_standard_error_and_results_on_standard_output():
    done = run()
    assert done.stdout == "the result\n"
    (line,) = done.stderr.splitlines()
    assert line.endswith(" INFO actors.training.worker: resumed step=15")
    assert line[:4].isdigit()


def test_another_console_repeats_nothing_and_shows_warnings_of_libraries():
    root, console = logging.getLogger(), logging.StreamHandler(io.StringIO())
    root.addHandler(console)
    try:
        quiet_root_handlers()
        for name in ("actors.training.worker", "a/file/of/a/library.py"):
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).info("an event")
            logging.getLogger(name).warning("a warning of %s", name)
    finally:
        root.removeHandler(console)
    assert console.stream.getvalue() == "a warning of a/file/of/a/library.py\n"


def test_the_level_comes_from_the_environment():
    assert "hidden" in run(**{LEVEL_VARIABLE: "debug"}).stderr
    assert run(**{LEVEL_VARIABLE: "error"}).stderr == ""


def test_an_unknown_level_is_rejected():
    with pytest.raises(ConfigError, match="log level 'LOUD' is unknown; use one of DEBUG, INFO, WARNING, ERROR"):
        configure_logging("loud")


def test_a_library_that_sets_its_own_level_later_stays_quiet(caplog):
    configure_logging()
    library = logging.getLogger("DeepSpeed")
    library.setLevel(logging.WARNING)  # as DeepSpeed does when it is imported
    library.warning("start-up noise")
    library.error("a failure")
    assert [record.message for record in caplog.records] == ["a failure"]
