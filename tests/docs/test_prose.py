"""Docstrings, option descriptions, errors, log lines and pages keep the style rules of CONTRIBUTING.md.

The patterns are those of a private English that this project once had. A sentence that a pattern rejects by mistake is
reworded: no list of exceptions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("rlhf_critic", "actors", "jobs") for path in (TOP / room).rglob("*.py"))
PAGES = sorted({*TOP.glob("*.md"), *TOP.glob("*/README.md"), *TOP.glob("docs/**/*.md"), *TOP.glob("tests/*/README.md")})

FIRST_WORDS = re.compile(r"^(What|Which|Of|Where|Whether that|As|And|That|Such)\b")
DESCRIPTION_FIRST_WORDS = re.compile(r"^(And|Or|Of|Which|Where|What|See|Likewise|Most|Fewest|As|That)\b")
ANYWHERE = re.compile(
    r"lose(s)? (its|their) beginning|\bmend(s|ed)?\b|goes on where|\bgo(es)? on\b|\bsaid of\b|begin(s)? alike"
    r"|\bthat which\b|\bsuch a one\b|whole or not at all|\bby (itself|themselves)\b|\bof its own accord\b"
    r"|\bnot yet run\b|\bis told\b|\bsays? so\b|\bwithout a word\b|\bfits a critic\b|\b[Bb]rought\b|\b[Mm]ost tokens\b",
)
CALLS_OF_LOGGERS = {"debug", "info", "warning", "error", "exception", "critical", "warn"}


def literal(node: ast.AST) -> str:
    """The text of a string or f-string, with ``{}`` for each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts_of(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """The kind, the line and the text of all prose in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield "docstring", node.body[0].lineno, docstring
            for attribute, below in pairwise(node.body):  # the description of an option stands below it
                if isinstance(attribute, ast.AnnAssign) and isinstance(below, ast.Expr):
                    yield "description", below.lineno, " ".join(literal(below.value).split())
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "description" and literal(keyword.value):
                    yield "description", node.lineno, literal(keyword.value)
            if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS_OF_LOGGERS and node.args:
                yield "log line", node.lineno, literal(node.args[0])
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                yield "error", node.lineno, literal(argument)


def fault(kind: str, text: str) -> str:
    """The rule that a text breaks, or an empty string."""
    if found := ANYWHERE.search(text):
        return f"has {found.group()!r}"
    first = DESCRIPTION_FIRST_WORDS if kind == "description" else FIRST_WORDS
    if kind in {"docstring", "description"} and (found := first.match(text)):
        return f"begins with {found.group()!r}"
    return "is shorter than four words" if kind == "description" and len(text.split()) < 4 else ""


def faults_of(path: Path) -> list[str]:
    """All faults of a module, as ``file:line: kind fault: text``."""
    found = texts_of(ast.parse(path.read_text(encoding="utf-8")))
    return [
        f"{path.relative_to(TOP)}:{line}: {kind} {wrong}: {text.splitlines()[0]}"
        for kind, line, text in found
        if text and (wrong := fault(kind, text))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.name))
def test_a_module_is_in_plain_english(path):
    assert "\n".join(faults_of(path)) == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(TOP)))
def test_a_page_is_in_plain_english(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wrong = [
        f"{path.name}:{number}: {fault('page', line)}" for number, line in enumerate(lines, 1) if fault("page", line)
    ]
    assert "\n".join(wrong) == ""


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("docstring", "What a rank without a history does."),
        ("docstring", "Of what is drawn from the data."),
        ("description", "And on which port."),
        ("description", "HTTP port."),
        ("error", "the row has no chosen text: mend this row"),
        ("log line", "the run goes on where it was"),
        ("page", "Longer sequences lose their beginning."),
    ],
)
def test_the_rules_reject_what_they_are_made_for(kind, text):
    assert fault(kind, text)
