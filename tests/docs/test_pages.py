"""README and docs are as they say: commands parse, code imports, links lead somewhere, generated pages are fresh."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re

import pytest
import yaml

from docs import generate
from jobs import cli
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.serve import Components
from tests.docs.pages import TOP, anchors, blocks, commands, job_of

README = TOP / "README.md"
PAGES = sorted({*TOP.glob("*.md"), *TOP.glob("*/README.md"), *TOP.glob("docs/*.md"), *TOP.glob("tests/*/README.md")})
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, words) for block in BLOCKS if block.language == "bash" for words in commands(block)]
JOBS = [(block, *job) for block, words in COMMANDS if (job := job_of(words))]
MODEL_OF = {command.module: generate.COMMANDS[name] for name, command in cli.COMMANDS.items()}
NOT_INSTALLED = {"vllm"}  # named by examples for other systems
PROGRAMS = {"aws", "cd", "curl", "docker", "export", "gcloud", "helm", "kubectl", "make", "pip", "python", "ray", "sed"}
PROGRAMS |= {"source", "test", "(umask", "rlhf-critic", "pre-commit"}


def names(things):
    return [str(thing) for thing in things]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_generated_pages_are_fresh():
    for page, text in (
        (generate.OPTIONS_PAGE, generate.options_page()),
        (generate.ARCHITECTURE_PAGE, generate.architecture_page()),
        (generate.COMPATIBILITY_PAGE, generate.compatibility_page()),
        (generate.MODELS_PAGE, generate.models_page()),
    ):
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is stale: run make docs"


@pytest.mark.parametrize("command", generate.COMMANDS)
def test_every_option_has_a_description(command):
    assert [row for row in generate.rows(generate.COMMANDS[command]) if row.endswith("|  |")] == []


@pytest.mark.parametrize(("block", "module", "arguments"), JOBS, ids=[f"{block}-{name}" for block, name, _ in JOBS])
def test_a_job_takes_the_options_that_a_page_gives_it(block, module, arguments):
    if "--config" in arguments:  # a file of the reader's
        place = arguments.index("--config")
        arguments = arguments[:place] + arguments[place + 2 :]
    if arguments != ["--help"]:
        parse_command_line(MODEL_OF[module], [word for word in arguments if word not in {">", "|"}])


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "cluster/README.md"])
def test_a_page_has_commands_to_check(page):
    assert sum(block.page == page for block, _, _ in JOBS) >= 4


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b}-{' '.join(w[:3])[:40]}" for b, w in COMMANDS])
def test_a_command_exists(block, words):
    words = words[1:] if "=" in words[0] else words
    program = words[0].rpartition("/")[2]
    if program.endswith(".sh"):
        assert os.access(TOP / words[0], os.X_OK), f"{block}: no script {words[0]}"
        return
    assert program in PROGRAMS, f"{block}: is {program} a program? Then name it in PROGRAMS"
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    if program == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"{block}: no module {words[2]}"
    elif program == "python":
        assert words[1].startswith(("make_csv", "ask")) or (TOP / words[1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_modules_and_targets_that_the_text_names_exist(page):
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ((?:jobs|benchmarks|tests)\.\w+)", text))
    assert [module for module in modules - {"jobs.NAME"} if importlib.util.find_spec(module) is None] == []
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


OPTION = re.compile(
    r"(?<![\w-])--((?:model|encoding|data|train|run|ppo|policy|critic|prompts|rollout|reward)\.[\w.-]+\w)"
)
KEY = re.compile(r"`((?:model|encoding|data|train|run|ppo|policy|critic|prompts|rollout|reward)\.[a-z_.]+[a-z])[`: ]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_options_that_the_text_names_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("may name options of the past")
    known = {row.split("`")[1] for model in generate.COMMANDS.values() for row in generate.rows(model)}
    text = page.read_text(encoding="utf-8")
    named = {name.replace("-", "_").replace(".no_", ".") for name in OPTION.findall(text)}
    named |= {name for name in KEY.findall(text) if not name.endswith((".py", ".json", ".jsonl"))}
    foreign = {"reward.remote_url", "reward.custom_reward_function.path", "reward.custom_reward_function.name"}
    methods = {"critic.values", "critic.update", "critic.save", "critic.forward_value"}
    assert sorted(named - known - foreign - methods) == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_compiles_and_its_imports_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module not in NOT_INSTALLED:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in {"json", "yaml"}], ids=str)
def test_data_parses(block):
    if block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    else:
        content = yaml.safe_load(block.text)
        assert "components" not in content or Components.model_validate(content)


def test_blocks_name_a_language_that_is_checked():
    assert {block.language for block in BLOCKS} <= {"", "bash", "json", "mermaid", "python", "text", "yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_site_has_every_page():
    navigation = re.findall(r": ([\w-]+\.md)$", (TOP / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(navigation) == sorted(page.name for page in (TOP / "docs").glob("*.md"))
    index = (TOP / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name for name in navigation if name != "index.md" and f"({name})" not in index] == []
