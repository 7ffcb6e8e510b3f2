"""The README's table of options is the config's, and the commands it names exist."""

import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from rlhf_critic.config.train import TrainJobConfig

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")


def option_rows() -> list[str]:
    """One table row per option of the training job."""
    rows = []
    for section, field in TrainJobConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, option in field.annotation.model_fields.items():
                rows.append(f"| `{section}.{name}` | `{option.default!r}` | {option.description} |")
        else:
            rows.append(f"| `{section}` | `{field.default!r}` | {field.description} |")
    return rows


def test_every_option_is_in_the_table_as_it_is():
    missing = [row for row in option_rows() if row not in README]
    assert not missing, "paste into README.md:\n" + "\n".join(option_rows())


@pytest.mark.parametrize("page", ["README.md", "cluster/README.md"])
def test_every_command_in_the_readme_exists(page):
    modules = set(re.findall(r"python -m ((?:jobs|benchmarks)\.\w+)", (TOP / page).read_text(encoding="utf-8")))
    assert modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
