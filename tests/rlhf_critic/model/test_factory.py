"""Models are built correctly: vocabulary, dropout, head, weights, partitioning under ZeRO-3, and errors."""

import gc
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaForSequenceClassification,
    OPTConfig,
    Phi3Config,
)

from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.factory import create_critic_model, create_hf_model, init_head
from rlhf_critic.model.hf_config import silence_dropout
from tests.helpers import save_tiny_model


def copy_of(model: str, directory: Path) -> Path:
    """Copies a model directory, for a test that damages it."""
    directory.mkdir()
    for file in Path(model).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_arguments_are_those_of_deepspeed_chat(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    config = {"zero_optimization": {"stage": 0}}
    model = create_hf_model(AutoModelForCausalLM, tiny_model, tokenizer, config, False, True)
    critic = create_critic_model(tiny_model, tokenizer, config, 0, False, True)
    assert model.config.pad_token_id == critic.config.pad_token_id == tokenizer.pad_token_id
    assert type(critic.model) is LlamaForSequenceClassification


@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
def test_the_vocabulary_is_padded_and_keeps_its_rows(request, model_class, fixture):
    source = request.getfixturevalue(fixture)
    tokenizer = load_tokenizer(source)
    before = AutoModelForCausalLM.from_pretrained(source)
    model = create_hf_model(model_class, source, tokenizer)
    rows = model.get_input_embeddings().weight
    old_rows = before.get_input_embeddings().weight
    assert len(rows) % 8 == 0
    assert len(rows) >= max(len(tokenizer), len(old_rows))
    assert len(rows) < len(tokenizer) + 8
    assert model.config.vocab_size == len(rows)
    assert torch.equal(rows[: len(old_rows)], old_rows)
    assert not rows[len(old_rows) :].any()


def test_the_vocabulary_is_never_shrunk(tmp_path):
    source = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    wide = AutoModelForCausalLM.from_pretrained(source)
    wide.resize_token_embeddings(1001)
    wide.save_pretrained(source)
    assert create_critic_model(source, load_tokenizer(source), None).config.vocab_size == 1008


def test_the_causal_model_computes_the_same_logits(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    before = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    after = create_hf_model(AutoModelForCausalLM, tiny_model, tokenizer).eval()
    ids = torch.tensor([[5, 9, 200, 31]])
    expected = before(ids).logits
    torch.testing.assert_close(after(ids).logits[..., : expected.shape[-1]], expected)


def test_a_causal_gpt_neox_has_its_output_layer_though_files_call_it_otherwise(tiny_model, tmp_path):
    source = copy_of(tiny_model, tmp_path / "gpt_neox")
    tokenizer = load_tokenizer(tiny_model)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("gpt_neox", vocab_size=len(tokenizer) - 1, **shape)
    before = AutoModelForCausalLM.from_config(config)
    before.save_pretrained(source)
    assert "embed_out.weight" in load_file(source / "model.safetensors")
    after = create_hf_model(AutoModelForCausalLM, str(source), tokenizer, rlhf_training=True)
    rows, old_rows = after.get_output_embeddings().weight, before.get_output_embeddings().weight
    assert torch.equal(rows[: len(old_rows)], old_rows)
    assert not rows[len(old_rows) :].any()
    assert create_critic_model(str(source), tokenizer, None).model.score.weight.any()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2Config(), ["attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"]),
        (OPTConfig(), ["dropout", "attention_dropout", "layerdrop"]),
        (BloomConfig(hidden_dropout=0.1, attention_dropout=0.1), ["hidden_dropout", "attention_dropout"]),
        (Phi3Config(resid_pdrop=0.1, attention_dropout=0.1), ["resid_pdrop", "embd_pdrop", "attention_dropout"]),
        (AutoConfig.for_model("bert", classifier_dropout=0.1), ["hidden_dropout_prob", "classifier_dropout"]),
        (
            AutoConfig.for_model("gpt_neox", hidden_dropout=0.2),
            ["hidden_dropout", "attention_dropout", "classifier_dropout"],
        ),
    ],
)
def test_dropout_is_silenced_under_every_name(config, names):
    for name in names:
        setattr(config, name, 0.1)
    silence_dropout(config)
    assert [getattr(config, name) for name in names] == [0.0] * len(names)
    assert config.vocab_size > 0.0


def test_dropout_is_left_alone_unless_asked(tmp_path):
    source = save_tiny_model(tmp_path / "model", tie_word_embeddings=False, attention_dropout=0.25)
    tokenizer = load_tokenizer(source)
    assert create_critic_model(source, tokenizer, None).config.attention_dropout == 0.25
    assert create_critic_model(source, tokenizer, None, disable_dropout=True).config.attention_dropout == 0.0


def test_a_new_head_is_drawn_as_stated(tiny_model):
    weight = torch.nn.Parameter(torch.zeros(1, 40_000))
    init_head(weight, "normal", seed=0)
    assert weight.std().item() == pytest.approx(40_001**-0.5, rel=0.02)
    assert abs(weight.mean().item()) < 1e-4
    tokenizer = load_tokenizer(tiny_model)
    assert not create_critic_model(tiny_model, tokenizer, None, head_init="zero").model.score.weight.any()
    torch.manual_seed(0)
    first = create_critic_model(tiny_model, tokenizer, None).model.score.weight
    torch.manual_seed(0)
    assert torch.equal(create_critic_model(tiny_model, tokenizer, None).model.score.weight, first)


def test_the_head_is_computed_in_fp32_whatever_the_body(tiny_model):
    critic = create_critic_model(tiny_model, load_tokenizer(tiny_model), {"bf16": {"enabled": True}})
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.bfloat16}
    hidden = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    values = critic.model.score(hidden)
    assert values.dtype == torch.float32
    expected = hidden.double() @ critic.model.score.weight.double().T
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


def test_keeping_the_first_layers_computes_what_they_compute(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    cut = create_hf_model(AutoModel, tiny_model, tokenizer, num_layers=1).eval()
    whole = AutoModel.from_pretrained(tiny_model).eval()
    whole.layers = whole.layers[:1]
    whole.config.num_hidden_layers = 1
    ids = torch.tensor([[5, 9, 200, 31]])
    torch.testing.assert_close(cut(ids).last_hidden_state, whole(ids).last_hidden_state)
    with pytest.raises(CheckpointError, match="num_layers is 3, but the model has 2 layers"):
        create_hf_model(AutoModel, tiny_model, tokenizer, num_layers=3)


@pytest.fixture
def trained(tiny_model, tmp_path) -> Path:
    """A trained critic under the family's own names."""
    critic = create_critic_model(tiny_model, load_tokenizer(tiny_model), None)
    critic.model.save_pretrained(tmp_path / "trained")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def as_single_safetensors(directory: Path) -> None:
    """Saves the weights as `save_pretrained` saves a small model."""


def as_split_safetensors(directory: Path) -> None:
    """Saves the weights as `save_pretrained` saves a large model."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2


def as_legacy_bin(directory: Path) -> None:
    """Saves the weights as DeepSpeed-Chat's save_hf_format does."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def as_ancient_bin(directory: Path) -> None:
    """Saves the weights as torch did before 1.6."""
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("form", [as_single_safetensors, as_split_safetensors, as_legacy_bin, as_ancient_bin])
def test_trained_weights_load_from_every_form(trained, form):
    expected = load_file(trained / "model.safetensors")
    form(trained)
    critic = create_critic_model(str(trained), load_tokenizer(str(trained)), None, rlhf_training=True)
    loaded = critic.model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


class _Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_bin_that_would_run_code_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_legacy_bin(trained)
    torch.save({"score.weight": _Payload()}, trained / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="rejected, because it holds more than weights"):
        create_critic_model(str(trained), load_tokenizer(str(trained)), None, rlhf_training=True)
    assert not (tmp_path / "executed").exists()


def test_keys_that_do_not_fit_are_all_listed(trained):
    weights = load_file(trained / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(2)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    weights["score.weight"] = torch.zeros(2, 32)
    save_file(weights, trained / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        create_critic_model(str(trained), load_tokenizer(str(trained)), None, rlhf_training=True)
    for problem in (
        "missing: model.norm.weight",
        "unexpected: model.layers.7.self_attn.q_proj.weight",
        "shape: model.layers.0.mlp.up_proj.weight: (3, 4) in the file, (64, 32) in the model",
        "shape: score.weight: (2, 32) in the file, (1, 32) in the model",
    ):
        assert problem in str(refused.value)


def test_a_missing_head_is_new_in_a_base_model_and_an_error_in_a_trained_one(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert create_critic_model(tiny_model, tokenizer, None).model.score.weight.any()
    with pytest.raises(CheckpointError, match=r"missing: score\.weight"):
        create_critic_model(tiny_model, tokenizer, None, rlhf_training=True)


def test_directories_without_config_or_weights_and_damaged_ones_are_refused(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    with pytest.raises(CheckpointError, match="no model config could be loaded"):
        create_critic_model(str(tmp_path / "nowhere"), tokenizer, None)
    bare = copy_of(tiny_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: neither"):
        create_critic_model(str(bare), tokenizer, None)
    cut = copy_of(tiny_model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        create_critic_model(str(cut), tokenizer, None)
    split = copy_of(tiny_model, tmp_path / "split")
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        create_critic_model(str(split), tokenizer, None)


# ZeRO-3: these functions are sent to real ranks and run there.

BIG = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}


def live_tensor_bytes() -> int:
    """Returns the bytes of all live tensors in this process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in {torch.Tensor, torch.nn.Parameter}:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_during_construction(source: str, stage: int) -> dict[str, int]:
    """Builds a critic; returns the bytes of the full model, of this rank's part, and of live tensors at most."""
    seen, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(live_tensor_bytes())
            time.sleep(0.01)

    tokenizer = load_tokenizer(source)
    config = deepspeed_config(ModelConfig(), TrainConfig(zero_stage=stage))
    gc.collect()
    before = live_tensor_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    critic = create_critic_model(source, tokenizer, config)
    seen.append(live_tensor_bytes())
    stop.set()
    watcher.join()
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in critic.parameters()]
    return {
        "whole": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in critic.parameters()),
        "kept": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "peak": max(seen) - before,
        "samples": len(seen),
    }


@pytest.mark.slow
def test_under_zero3_no_rank_ever_holds_the_whole_model(ranks, tmp_path):
    source = save_tiny_model(tmp_path / "big", tie_word_embeddings=True, **BIG)
    for measured in ranks(2).run(peak_during_construction, source, 3):
        assert measured["whole"] > 140e6
        assert measured["kept"] < 0.52 * measured["whole"]
        assert measured["kept"] <= measured["peak"] < 0.65 * measured["whole"]
        assert measured["samples"] > 20
    # The measurement is sensitive: without partitioning the same construction holds the full model.
    for measured in ranks(2).run(peak_during_construction, source, 0):
        assert measured["peak"] >= measured["whole"]


def gathered_weights(source: str, stage: int) -> dict[str, torch.Tensor]:
    """Returns the gathered weights of a critic built at a ZeRO stage, as every rank sees them."""
    from rlhf_critic.model.weights import gathered, persistent_tensors

    torch.manual_seed(7)
    config = deepspeed_config(ModelConfig(), TrainConfig(zero_stage=stage))
    critic = create_critic_model(source, load_tokenizer(source), config)
    weights = {}
    for name, tensor in persistent_tensors(critic.model).items():
        with gathered(tensor):
            weights[name] = tensor.detach().clone()
    return weights


@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
def test_under_zero3_all_ranks_get_the_same_weights_and_head(ranks, request, fixture):
    source = request.getfixturevalue(fixture)
    (plain,) = ranks(1).run(gathered_weights, source, 0)
    for weights in ranks(2).run(gathered_weights, source, 3):
        assert weights.keys() == plain.keys()
        for name, tensor in plain.items():
            assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("config", "attention", "message"),
    [
        (AutoConfig.for_model("codegen"), None, "cannot build AutoModelForSequenceClassification for .*'codegen'"),
        (BloomConfig(), "sdpa", "model type 'bloom' with these options: .* another --model.attn-implementation"),
    ],
)
def test_a_model_that_transformers_cannot_build_is_refused(tiny_model, tmp_path, config, attention, message):
    source = copy_of(tiny_model, tmp_path / "other")
    config.save_pretrained(source)
    with pytest.raises(CheckpointError, match=message):
        create_critic_model(str(source), load_tokenizer(tiny_model), None, attn_implementation=attention)
