"""Writes the duration of every test to a file: ``pytest --durations-file=benchmarks/test_durations.txt``.

Durations are sums over set-up, call and tear-down, so the first test of a fixture carries the fixture's seconds. A file
that exists is updated, so that several runs of pytest (``make test-all``) fill one file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

OPTION = "--durations-file"
LINE = re.compile(r"^ *(\d+\.\d+)  (tests/.*)$")
HEADER = "# Seconds of each test (set-up, call and tear-down), the slowest first; `make test-all` writes this file.\n"


def add_option(parser: pytest.Parser) -> None:
    """Adds ``--durations-file``."""
    parser.addoption(OPTION, metavar="FILE", help="add the duration of every test to this file")


def write(reporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes what the file held before and what this run measured, with a sum for each folder."""
    if not (name := config.getoption(OPTION)):
        return
    path = Path(name)
    seconds = read(path) if path.exists() else {}
    measured: defaultdict[str, float] = defaultdict(float)
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                measured[report.nodeid] += report.duration
    path.write_text(as_text({**seconds, **measured}), encoding="utf-8")


def read(path: Path) -> dict[str, float]:
    """Returns the seconds of each test that a file names."""
    lines = map(LINE.match, path.read_text(encoding="utf-8").splitlines())
    return {line[2]: float(line[1]) for line in lines if line}


def as_text(seconds: dict[str, float]) -> str:
    """Returns the file's text: sums by folder, then tests, the slowest first."""
    folders: defaultdict[str, float] = defaultdict(float)
    for test, duration in seconds.items():
        folders[str(Path(test.partition("::")[0]).parent)] += duration
    sums = "".join(f"# {duration:8.1f}  {name}\n" for name, duration in sorted(folders.items()))
    total = f"# {sum(seconds.values()):8.1f}  sum of {len(seconds)} tests; three processes share them\n"
    tests = sorted(seconds.items(), key=lambda entry: (-entry[1], entry[0]))
    return HEADER + sums + total + "".join(f"{duration:8.2f}  {test}\n" for test, duration in tests)
