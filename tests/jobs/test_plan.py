"""A plan tells what fits a GPU and which options make it fit; cluster/README.md has the planner's numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from jobs import plan as plan_job
from jobs.plan import _gb, changes_that_fit, plan_values, planner_of
from jobs.plan_catalog import GPUS, SHAPES, NodeGroup, model_config, node_groups
from rlhf_critic.config.tools import GpuName, PlanJobConfig, SizeNames
from rlhf_critic.errors import ConfigError
from rlhf_critic.training.memory_planner import USABLE, Planner
from tests.jobs.command_line import run

TOP = Path(__file__).parents[2]
README = TOP / "cluster" / "README.md"
WORLD_SIZES = (1, 8, 64, 256, 1024)
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
CLUSTER = {
    "max_workers": 12,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "trainers": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 2},
        "scorers": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 30},
        "drivers": {"resources": {"CPU": 8}},
    },
}


def plan_of(**options) -> Planner:
    return planner_of(PlanJobConfig(**options))


@pytest.fixture
def cluster(tmp_path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(("size", "parameters"), [("0.1B", 134.5e6), ("0.5B", 494e6), ("8B", 7.5e9), ("70B", 69.5e9)])
def test_known_sizes_are_those_of_the_models_they_are_named_after(size, parameters):
    """The published sizes; Llama-3.1 without its output layer of 128,256 rows, which a critic does not have."""
    assert plan_of(model=size).count.parameters == pytest.approx(parameters, rel=0.005)


def test_a_model_directory_and_its_config_file_count_what_the_model_has(tiny_model):
    whole = plan_of(model=tiny_model).count
    assert whole == plan_of(model=f"{tiny_model}/config.json").count
    adapted = plan_of(model=tiny_model, lora_rank=2).count
    assert sum(adapted.frozen) == whole.parameters - 32  # all but the head
    assert sum(adapted.trained) < adapted.parameters / 2


@pytest.mark.parametrize(
    "asked",
    [
        "--model 8B --world-size 8 --zero-stage 0 --gpu l4",
        # With one rank a higher stage takes more.
        "--model 3B --dtype float32 --world-size 1 --zero-stage 3",
        "--model 1B --dtype float32 --world-size 1 --zero-stage 2 --gpu l4",
    ],
)
def test_what_does_not_fit_fits_as_advised(monkeypatch, capsys, asked):
    arguments = [*asked.split(), "--json"]
    code, output, _ = run(plan_job.main, arguments, monkeypatch, capsys)
    assert code == 0
    found = json.loads(output)
    assert not found["fits"]
    assert found["memory"]["peak"] > 0.9 * found["gpu"]["memory"]
    assert found["way_out"]
    for way in found["way_out"]:
        flags = way.split(" (")[0].split()
        code, output, _ = run(plan_job.main, [*arguments, *flags], monkeypatch, capsys)
        assert code == 0
        assert json.loads(output)["fits"], way


def test_the_smallest_stage_fits_and_the_one_below_does_not():
    planner = plan_of(model="3B", world_size=8, zero_stage=3, gpu="l40s", gradient_checkpointing=True)
    stage = planner.smallest_stage(planner.setup)
    assert stage in {1, 2, 3}
    assert planner.fits(planner.setup.model_copy(update={"zero_stage": stage}))
    assert not planner.fits(planner.setup.model_copy(update={"zero_stage": stage - 1}))
    assert planner.fits(planner.setup)
    assert changes_that_fit(planner) == []


def test_stage_1_is_recommended_where_it_fits_and_otherwise_the_lowest():
    for options, smallest, recommended in (
        ({"model": "0.5B", "gpu": "h100"}, 0, 1),
        ({"model": "8B", "gpu": "h100", "world_size": 8, "gradient_checkpointing": True}, 1, 1),
        ({"model": "70B", "world_size": 1}, None, None),
    ):
        planner = plan_of(**options)
        assert planner.smallest_stage(planner.setup) == smallest
        assert planner.recommended_stage(planner.setup) == recommended
        assert plan_values(planner, [])["recommended_zero_stage"] == recommended


def test_no_number_of_ranks_and_no_stage_may_fit():
    large = {"model": "70B", "zero_stage": 3, "token_budget": 1024, "gradient_checkpointing": True}
    assert plan_of(**large, world_size=1024, gpu="l4").enough_ranks() is None
    alone = plan_of(model="70B", world_size=1)
    assert alone.smallest_stage(alone.setup) is None


def test_offloading_at_the_wrong_stage_is_refused():
    with pytest.raises(ValueError, match="needs zero_stage 3"):
        PlanJobConfig(zero_stage=2, offload_parameters=True)


def test_nodes_are_counted_for_each_group_with_gpus(cluster, monkeypatch, capsys):
    assert node_groups(cluster) == [NodeGroup("trainers", 8, 2), NodeGroup("scorers", 1, 12)]
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--model", "1B", "--world-size", "17", "--cluster", cluster]
    code, output, _ = run(plan_job.main, arguments, monkeypatch, capsys)
    assert code == 0
    rows = dict([cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if line.count("│") == 3)
    assert rows["nodes of trainers (8 a100-80g each)"] == "3, but max_workers allows 2"
    assert rows["nodes of scorers (1 a100-80g each)"] == "17, but max_workers allows 12"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "has no readable available_node_types"),
        ("cluster_name: x", "has no readable available_node_types"),
        (yaml.safe_dump({"available_node_types": {"head": {"resources": {"CPU": 1}}}}), "no node type has a GPU"),
    ],
)
def test_a_cluster_file_without_gpus_is_refused(tmp_path, content, message):
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        node_groups(str(path))


def test_the_time_of_a_step_is_that_of_the_measured_or_the_assumed_rate():
    options = {"model": "0.1B", "world_size": 16, "tokens_per_step": 80_000}
    assert plan_of(**options, tokens_per_second=1000).step_seconds() == pytest.approx(5)
    assumed = plan_of(**options, utilisation=0.5, gpu="h100", max_length=512)
    multiplied = assumed.count.parameters - 49_152 * 576
    operations = 6 * multiplied + 6 * 30 * 576 * 512
    expected = 80_000 * operations / (0.5 * 989e12 * 16)
    assert assumed.step_seconds() == pytest.approx(expected)
    assert plan_values(assumed, [])["step_seconds_are"] == "assumed"


def test_it_neither_starts_nor_imports_ray():
    code = "import sys, jobs.plan; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP, check=False, timeout=120).returncode == 0


def markdown_table(config: PlanJobConfig) -> str:
    """For all known sizes and some numbers of GPUs, the lowest ZeRO stage that fits and its memory."""
    gpu = GPUS[config.gpu]
    ranks = " | ".join(f"{n:,} GPU{'s' * (n > 1)}" for n in WORLD_SIZES)
    lines = [
        f"Calculated, not measured: the lowest ZeRO stage at which a shard fits an {gpu.name}, of which {USABLE:.0%}",
        f"is used, and the memory that it takes. {config.dtype}, gradient checkpointing, micro-batches of",
        f'{config.token_budget:,} tokens in sequences of up to {config.max_length:,}. "offload" keeps parameters and',
        "optimizer state in the memory of the CPUs, of which it takes the second number for each GPU.",
        "",
        f"| model | parameters of the critic | {ranks} |",
        "|---|---|" + "---|" * len(WORLD_SIZES),
    ]
    for size in SHAPES:
        planner = planner_of(config.model_copy(update={"model": size}))
        cells = " | ".join(cell(planner, world_size) for world_size in WORLD_SIZES)
        lines.append(f"| {size} | {planner.count.parameters / 1e9:.2f} billion | {cells} |")
    return "\n".join(lines)


def cell(planner: Planner, world_size: int) -> str:
    setup = planner.setup.model_copy(update={"world_size": world_size, "gradient_checkpointing": True})
    stage = planner.smallest_stage(setup)
    if stage is not None:
        memory = planner.memory(setup.model_copy(update={"zero_stage": stage}))
        return f"ZeRO-{stage}, {_gb(memory.peak)}"
    setup = setup.model_copy(update={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True})
    memory = planner.memory(setup)
    return f"offload, {_gb(memory.peak)} and {_gb(memory.host)}" if planner.fits(setup) else "no"


@pytest.mark.slow
@pytest.mark.skipif(not README.exists(), reason="there is no cluster/README.md")
def test_the_table_in_the_cluster_guide_is_what_the_planner_calculates():
    text = README.read_text(encoding="utf-8")
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    table = markdown_table(PlanJobConfig())
    numbers, expected = ([line for line in page.splitlines() if line[:1] == "|"] for page in (written, table))
    assert numbers == expected, f"paste between {BEGIN} and {END}:\n{table}"


def test_sizes_and_gpus_are_what_their_makers_say():
    assert {model_config(size).model_type for size in SHAPES} == {"llama", "qwen2"}
    assert GPUS["l4"].memory == 24 * 10**9
    assert set(get_args(GpuName)) == set(GPUS)
    assert SizeNames.split(", ") == list(SHAPES)
