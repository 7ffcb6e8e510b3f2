"""The public names of both packages load on first use and are those of their modules."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PUBLIC = {
    "rlhf_critic": "Encoder ScorerClient connect_http create_critic_model create_hf_model load_critic load_tokenizer",
    "actors": "CriticGroup CriticOptions connect",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_there_and_others_are_not(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package].split()
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("package", PUBLIC)
def test_importing_a_package_is_light(package):
    heavy = "{'torch', 'ray', 'transformers', 'deepspeed', 'datasets', 'numpy', 'pydantic'}"
    code = f"import sys, {package}; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, check=False, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, b"")
