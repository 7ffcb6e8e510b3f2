"""Resharding: loads a DeepSpeed state on another number of ranks than saved it, through a universal checkpoint.

Lian et al., "Universal Checkpointing" (2024): the shards of weights and moments are merged into one file for each
parameter, from which every rank reads its own shard. The conversion is DeepSpeed's. It runs once on each node, into a
temporary directory. This module also restores what DeepSpeed 0.19.8 does not: frozen parameters, the decay of each
parameter group and the step count of each shard. DeepSpeed unpickles, so load only what this project wrote. Knows
nothing about critics.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.weights import full_shape, gathered, is_writer
from rlhf_critic.training.process_group import raise_on_all_ranks

CONVERSION_TIMEOUT_S = 1500.0  # below the 1800 s after which torch.distributed gives up on the rank that converts
PROCESSES = 2  # processes of the conversion, each with the shard of one rank in memory
SHOWN_CHARACTERS = 2000  # length of the shown output of a failed conversion
FOLDER = "universal"


def load_resized(engine: Any, state: Path, saved_world_size: int) -> None:
    """Loads a state that another number of ranks saved. Collective.

    Every parameter, moment, step count and the schedule are restored as saved. Only later sums over ranks are added in
    another order. Each node needs room for two fp32 copies of parameters and moments in its directory for temporary
    files, which is emptied afterwards.

    Args:
        engine: DeepSpeed's engine before its first step, at the ZeRO stage of the state (1 to 3).
        state: The directory that ``save_checkpoint`` wrote (with the tag), as every node sees it. It is not changed.
        saved_world_size: Number of ranks that wrote it.

    Raises:
        CheckpointError: The state cannot be converted.
    """
    stage = engine.zero_optimization_stage()
    shards = len(list(state.glob("*_optim_states.pt")))
    if shards != saved_world_size:  # the conversion would merge the shards that exist
        raise CheckpointError(
            f"{state}: incomplete: found shards of {shards} ranks, expected {saved_world_size}; resume from another "
            "checkpoint"
        )
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    with _converted(state, stage) as directory:
        _load_frozen(engine.module, state, stage, saved_world_size)
        # DeepSpeed's switch is on for this load only: with it on, the engine loads universal checkpoints alone.
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(directory.parent), tag=directory.name)
        finally:
            engine._config.load_universal_checkpoint = False
    # At stage 3 DeepSpeed gives every group the options of the first group and one shared step tensor. torch's fused
    # AdamW would increment that tensor once for each group. At any stage the tensor is on the CPU.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, moments in engine.optimizer.state.items():
        moments["step"] = torch.as_tensor(moments["step"]).to(parameter.device, torch.float32, copy=True)


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Yields a path to a directory without the characters that DeepSpeed's loader takes for a pattern of names.

    It is a link in a temporary directory where the path itself has such characters, as ``sweep[3]`` has.
    """
    directory = directory.resolve()
    if glob.escape(str(directory)) == str(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-critic-link-") as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(directory, target_is_directory=True)
        yield link


@contextmanager
def _converted(state: Path, stage: int) -> Iterator[Path]:
    """Yields the universal checkpoint of a state, made by one rank of each node. It exists within the block only."""
    name = [f"rlhf-critic-resize-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    work = Path(tempfile.gettempdir()) / name[0]
    try:
        # The ranks that share a node are not known here. The rank that creates the directory first converts.
        work.mkdir(mode=0o700)
        is_first = True
    except FileExistsError:
        is_first = False
    try:
        raise_on_all_ranks(lambda: convert(state, work / FOLDER, stage) if is_first else None)
        yield work / FOLDER
        dist.barrier()  # other ranks may still read
    finally:
        if is_first:
            shutil.rmtree(work, ignore_errors=True)


def convert(state: Path, directory: Path, stage: int, timeout_s: float = CONVERSION_TIMEOUT_S) -> None:
    """Runs DeepSpeed's conversion into a directory, in a separate process.

    The conversion starts processes, which a process with threads, such as a Ray worker, should not do.

    Raises:
        CheckpointError: The conversion failed or took too long. All its processes have ended.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output, plain_path(state) as plain_state:
        command = [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(plain_state), "--output_folder", str(directory)),
            *("--num_extract_workers", str(PROCESSES), "--num_merge_workers", str(PROCESSES)),
            *(["--inject_missing_state"] if stage < 3 else []),
        ]
        process = subprocess.Popen(
            command,
            cwd=directory.parent,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its processes can be killed with it
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return
        why = f"did not end within {timeout_s:g} s" if code is None else f"ended with exit code {code}"
        output.seek(0)
        raise CheckpointError(
            f"{state}: resuming on another number of ranks needs DeepSpeed's conversion to a universal checkpoint, "
            f"which {why}. Resume on the number of ranks that saved it, or fix the cause (the conversion needs room "
            f"in {tempfile.gettempdir()}); its output ends with: {output.read()[-SHOWN_CHARACTERS:]}"
        )


def _load_frozen(module: torch.nn.Module, state: Path, stage: int, saved_world_size: int) -> None:
    """Loads the frozen parameters, which a universal checkpoint does not contain."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return

    def read(file: str) -> Any:
        return torch.load(state / file, map_location="cpu", weights_only=False, mmap=True)

    if stage < 3:
        complete = read("mp_rank_00_model_states.pt")["module"]
    else:
        files = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(saved_world_size))
        shards = [read(file)["frozen_param_fragments"] for file in files]
    for name, parameter in frozen.items():
        with torch.no_grad(), gathered(parameter, modify=True):
            if not is_writer(parameter):
                continue
            if stage < 3:
                parameter.copy_(complete[name])
            else:
                shape = full_shape(parameter)
                padded = torch.cat([shard[name].flatten() for shard in shards])
                parameter.copy_(padded[: shape.numel()].view(shape))
