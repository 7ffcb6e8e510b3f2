"""Imports between rooms go in the directions that docs/architecture.md shows, and rooms stay small enough to read.

An import inside a function counts as well. The tests read the source; they import nothing of it.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("rlhf_critic", "actors", "jobs")
MAX_LINES, MAX_FILES = 500, 22
GROUND = {"errors", "files", "logs", "config"}  # every room may use these
# What each room may import of its own package, beside itself and the ground.
ROOMS = {
    "rlhf_critic": {
        "errors": set(),
        "files": set(),
        "logs": set(),
        "config": set(),
        "batching": set(),
        "data": {"batching"},
        "algorithms": {"batching"},
        "model": {"data", "algorithms", "batching"},
        "checkpoint": {"model", "data", "algorithms"},
        "evaluation": {"data"},
        "scoring": {"model", "data", "batching"},
        "integrations": {"scoring", "data"},
        "training": {"checkpoint", "model", "evaluation", "data", "algorithms", "batching"},
    },
    "actors": {"runtime": set(), "serving": {"runtime"}, "training": {"runtime"}, "ppo": {"runtime"}},
}
# The one file of a room that may use another room.
ONLY = {
    ("model", "data"): "rlhf_critic/model/generation.py",
    ("scoring", "model"): "rlhf_critic/scoring/local.py",
}
PACKAGE_ARROWS = {"rlhf_critic": set(), "actors": {"rlhf_critic"}, "jobs": {"actors", "rlhf_critic"}}


def sources(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it; of ``from a import b`` both ``a`` and ``a.b``."""
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def arrows() -> list[tuple[str, str]]:
    """Every import, as the path of a file and the module that it imports."""
    paths = [path for package in PACKAGES for path in sources(package)]
    return [(str(path.relative_to(REPOSITORY)), module) for path in paths for module in imports_of(path)]


def room_of(dotted: str) -> tuple[str, str]:
    """The package and room of a module; the room is empty for the package's own front door."""
    package, _, rest = dotted.partition(".")
    return package, rest.partition(".")[0]


def room_arrows(package: str) -> Iterator[tuple[str, str, str]]:
    """Imports between rooms of one package: the file, its room and the room that it imports."""
    for name, module in arrows():
        dotted = ".".join(Path(name).with_suffix("").parts)
        (source, room), (target, imported) = room_of(dotted), room_of(module)
        if source == target == package and room != "__init__" and imported in ROOMS[package] and imported != room:
            yield name, room, imported


def test_packages_use_only_those_below_them():
    wrong = [
        (name, module)
        for name, module in arrows()
        if (target := room_of(module)[0]) in PACKAGES
        and target != (source := Path(name).parts[0])
        and target not in PACKAGE_ARROWS[source]
    ]
    assert not wrong


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_use_only_those_that_they_may(package):
    rooms = ROOMS[package]
    there = {path.name for path in (REPOSITORY / package).iterdir() if any(path.glob("*.py"))}
    assert there <= rooms.keys(), "a room without a rule"
    wrong = [
        (name, imported)
        for name, room, imported in room_arrows(package)
        if imported not in rooms[room] | GROUND or ONLY.get((room, imported), name) != name
    ]
    assert not wrong


@pytest.mark.parametrize("package", ROOMS)
def test_no_import_leads_round_in_a_circle_of_rooms(package):
    above: dict[str, set[str]] = {room: set() for room in ROOMS[package]}
    for _, room, imported in room_arrows(package):
        above[room].add(imported)
    while leaves := {room for room, used in above.items() if not used & above.keys()}:
        above = {room: used for room, used in above.items() if room not in leaves}
    assert not above, "these rooms import each other"


def test_the_library_knows_no_ray_and_its_config_no_torch():
    wrong = [
        (name, module)
        for name, module in arrows()
        if (name.startswith("rlhf_critic/") and room_of(module)[0] == "ray")
        or (name.startswith("rlhf_critic/config/") and room_of(module)[0] in {"torch", "transformers", "deepspeed"})
    ]
    assert not wrong


def test_the_graph_that_these_tests_read_is_there():
    seen = Counter(name.partition("/")[0] for name, _ in arrows())
    assert all(seen[package] > 100 for package in PACKAGES), seen


def test_files_and_folders_are_small_enough_to_read():
    files = [path for package in PACKAGES for path in sources(package)]
    assert not [path for path in files if path.read_text(encoding="utf-8").count("\n") > MAX_LINES]
    in_folder = Counter(path.parent for path in files)
    assert not {folder for folder, number in in_folder.items() if number > MAX_FILES}
