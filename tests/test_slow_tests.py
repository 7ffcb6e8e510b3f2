"""Every file with slow tests has a row in the table of tests/README.md, and every row names such a file."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MARKS = re.compile(r"mark\.slow\b|mark\.cluster\b|\bslow_except\(|\bSTAGES_ON_RANKS\b")


def test_the_table_of_slow_tests_names_every_file_once_with_what_it_guards_and_why_it_is_slow():
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if path != Path(__file__)]
    marked = sorted(str(path.relative_to(REPOSITORY)) for path in files if MARKS.search(path.read_text("utf-8")))
    text = (REPOSITORY / "tests" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(tests/\S+\.py)` \| ([^|]{10,}) \| ([^|]{5,}) \|", text, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == marked
