"""On the same token ids, a converted critic gives the score that the system that trained it defines."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_critic.checkpoint.convert import FORMATS, convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import CheckpointError, EncodingError
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import save_tiny_tokenizer, tiny_config

BOS, EOS = 0, 1  # ids of the small tokenizer
SMALL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
ROWS = 336  # the tokenizer's 333 ids, rounded up as DeepSpeed-Chat does
BIAS = 0.375

Scores = Callable[[PreTrainedModel, nn.Linear, list[list[int]]], list[float]]


def family(name: str) -> PreTrainedConfig:
    heads = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": ROWS, **SMALL}
    opt = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": ROWS}
    configs: dict[str, PreTrainedConfig] = {
        "llama": tiny_config(ROWS, **SMALL),
        "opt": OPTConfig(**opt, word_embed_proj_dim=16, max_position_embeddings=256, **SMALL),
        "gpt2": GPT2Config(**heads, n_positions=256),
        "gptj": GPTJConfig(**heads, n_positions=256, rotary_dim=4),
        "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=ROWS, **SMALL),
    }
    return configs[name]


def random_reward_model(name: str, bias: float | None = None) -> tuple[PreTrainedModel, nn.Linear]:
    """Returns a bare backbone and a linear head with weights large enough for scores to differ."""
    torch.manual_seed(0)
    config = family(name)
    body = AutoModel.from_config(config, dtype=torch.float32).eval()
    head = nn.Linear(getattr(config, "word_embed_proj_dim", config.hidden_size), 1, bias=bias is not None)
    with torch.no_grad():
        for parameter in [*body.parameters(), head.weight]:
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05))
        if bias is not None:
            head.bias.fill_(bias)
    return body, head


def old_buffers(body: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the config that transformers of 2023 saved with the weights."""
    layers = range(body.config.num_hidden_layers)
    if body.config.model_type in {"gpt2", "gptj"}:
        mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
        buffers = {f"h.{layer}.attn.bias": mask for layer in layers}
        return {**buffers, **{f"h.{layer}.attn.masked_bias": torch.tensor(-1e9) for layer in layers}}
    if body.config.model_type == "llama":
        return {f"layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in layers}
    return {}


def save_foreign(directory: Path, body: PreTrainedModel, backbone: str, heads: dict[str, Tensor]) -> Path:
    """Saves ``pytorch_model.bin``, the config and the tokenizer; returns the directory."""
    save_tiny_tokenizer(directory)
    body.config.save_pretrained(directory)
    named = {f"{backbone}{name}": tensor for name, tensor in {**body.state_dict(), **old_buffers(body)}.items()}
    torch.save({**named, **heads}, directory / "pytorch_model.bin")
    return directory


def padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns rows padded on the right beyond the longest, and the mask of real tokens."""
    longest = max(map(len, sequences)) + 3
    ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return ids, mask


def values_of(body: PreTrainedModel, head: nn.Linear, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return head(body(ids, attention_mask=mask).last_hidden_state).squeeze(-1)


def deepspeed_chat_scores(leading: int) -> Scores:
    """Scores as ``forward_value``: the value before the first pad after ``num_padding_at_beginning``; PAD = EOS."""

    def scores(body: PreTrainedModel, head: nn.Linear, sequences: list[list[int]]) -> list[float]:
        ids, mask = padded(sequences, EOS)
        found = []
        for row, values in zip(ids, values_of(body, head, ids, mask), strict=True):
            pads = [column for column, token in enumerate(row.tolist()) if token == EOS]
            found.append(float(values[pads[leading] - 1]))
        return found

    return scores


def article_scores(body: PreTrainedModel, head: nn.Linear, sequences: list[list[int]]) -> list[float]:
    """Scores at the column (columns minus pads minus 1); the pad token is a separate token."""
    pad = ROWS - 1
    ids, mask = padded(sequences, pad)
    ends = [len(row) - sum(token == pad for token in row) - 1 for row in ids.tolist()]
    values = values_of(body, head, ids, mask)
    return [float(row[max(end, 0)]) for row, end in zip(values, ends, strict=True)]


def text_ids(begin: Sequence[int] = ()) -> list[list[int]]:
    """Returns token ids of very different lengths without EOS, which is the pad token of those systems."""
    generator = torch.Generator().manual_seed(1)
    return [[*begin, *torch.randint(3, 333, (n,), generator=generator).tolist()] for n in (1, 2, 9, 30, 60)]


HEAD = "v_head.weight"
SYSTEMS: dict[str, tuple[str, str, str, str, Scores, list[list[int]]]] = {
    "DeepSpeed-Chat, Llama": ("deepspeed-chat", "llama", "rwtransformer.", HEAD, deepspeed_chat_scores(0), text_ids()),
    "DeepSpeed-Chat, misspelt": (
        "deepspeed-chat",
        "gpt2",
        "rwtranrsformer.",
        HEAD,
        deepspeed_chat_scores(0),
        text_ids(),
    ),
    # OPT's tokenizer puts its pad token in front of every text.
    "DeepSpeed-Chat, OPT": ("deepspeed-chat", "opt", "rwtransformer.", HEAD, deepspeed_chat_scores(1), text_ids([EOS])),
    # trlx counts like DeepSpeed-Chat, which adopted its code, does without leading pads.
    "trlx, GPT-2": ("trlx", "gpt2", "transformer.", HEAD, deepspeed_chat_scores(0), text_ids()),
    "trlx, GPT-J": ("trlx", "gptj", "transformer.", HEAD, deepspeed_chat_scores(0), text_ids()),
    "article, Llama": ("article", "llama", "model.", "value_head.weight", article_scores, text_ids([BOS])),
    "article, BLOOM": ("article", "bloom", "transformer.", "value_head.weight", article_scores, text_ids()),
}


def rewards_of(directory: Path, sequences: list[list[int]]) -> np.ndarray:
    return score_sequences(load_critic(directory).critic, sequences, 500)


@pytest.mark.parametrize("what", SYSTEMS)
def test_the_reward_is_the_systems_own_score(what, tmp_path):
    expected_format, name, backbone, head_name, scores, sequences = SYSTEMS[what]
    body, head = random_reward_model(name)
    source = save_foreign(tmp_path / "source", body, backbone, {head_name: head.weight.data})
    card = convert_checkpoint(source, tmp_path / "out")
    assert card.training["converted_from"] == expected_format
    assert "head_bias" not in card.training
    assert card.reward_mean is None
    expected = scores(body, head, sequences)
    assert np.ptp(expected) > 0.1, "scores that differ"
    np.testing.assert_allclose(rewards_of(tmp_path / "out", sequences), expected, rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.bin"))


def save_native(directory: Path, **config: Any) -> Path:
    """Saves like TRL and OpenRLHF: safetensors, names of transformers, the tokenizer and its template."""
    save_tiny_tokenizer(directory)
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(tiny_config(333, num_labels=1, **SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    saved = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**saved, **config}))
    return directory


def test_a_native_model_is_taken_as_it_is(tmp_path):
    source = save_native(tmp_path / "source", mean=0.25, std=2.0, pad_token_id=2)
    card = convert_checkpoint(source, tmp_path / "out", max_length=50)
    assert (card.reward_mean, card.reward_std) == (0.25, 2.0), "OpenRLHF's statistics"
    assert card.encoder.max_length == 50
    encoder = load_critic(tmp_path / "out").encoder
    assert encoder.tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    plain = AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.no_grad():
        expected = [plain(torch.tensor([ids])).logits.item() for ids in text_ids()]
    np.testing.assert_allclose(rewards_of(tmp_path / "out", text_ids()), expected, rtol=0, atol=1e-5)


PADDED_PAIRS = [("please explain", " of course"), ("", "no"), ("thank you", " 1</s>"), ("a", "</s></s>")]


@pytest.mark.parametrize("chat_template", ["auto", "plain"])
def test_a_score_that_is_read_before_a_padding_eos_is_kept(chat_template, tmp_path):
    """The source reads its score before the EOS at the end, because EOS is its pad token."""
    source = save_native(tmp_path / "source")  # pads with EOS
    own, plain = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source)
    convert_checkpoint(source, tmp_path / "out", chat_template=chat_template)
    loaded = load_critic(tmp_path / "out")
    for prompt, response in PADDED_PAIRS:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        joined = f"{prompt}{response}</s>"
        text = own.apply_chat_template(messages, tokenize=False) if chat_template == "auto" else joined
        ids = own(text)["input_ids"]
        assert ids[-1] == EOS
        with torch.no_grad():
            score = plain.eval()(torch.tensor([ids])).logits.item()
        encoded = loaded.encoder.encode(prompt, response).ids
        assert encoded[-1] != EOS
        rewards = score_sequences(loaded.critic, [encoded], 500)
        np.testing.assert_allclose(rewards, [score], rtol=1e-6, atol=1e-6)


def test_a_pad_token_that_cannot_be_left_out_is_refused(tmp_path):
    source = save_native(tmp_path / "source")
    pad = AutoTokenizer.from_pretrained(source)(" please")["input_ids"]
    source = save_native(tmp_path / "source", pad_token_id=pad[-1])
    (tmp_path / "own.jinja").write_text("{{ messages[-1]['content'] }} please")
    with pytest.raises(
        EncodingError, match=r"the token .* ends the texts of this chat template and is the pad token of the model"
    ):
        convert_checkpoint(source, tmp_path / "out", chat_template=str(tmp_path / "own.jinja"))


def test_openrlhf_reads_its_score_at_the_eos_even_if_it_pads_with_it(tmp_path):
    source = save_native(tmp_path / "source", value_head_prefix="score")
    convert_checkpoint(source, tmp_path / "out")
    encoder = load_critic(tmp_path / "out").encoder
    assert encoder.render("please", "no") == "<|user|>please</s><|assistant|>no</s>"
    convert_checkpoint(save_native(tmp_path / "unnamed"), tmp_path / "plain", chat_template="openrlhf-plain")
    assert load_critic(tmp_path / "plain").encoder.render("please ", "no\n") == "please no </s>"


def save_article(directory: Path, bias: float) -> tuple[Path, PreTrainedModel, nn.Linear]:
    body, head = random_reward_model("llama", bias)
    heads = {"value_head.weight": head.weight.data, "value_head.bias": head.bias.data}
    return save_foreign(directory, body, "model.", heads), body, head


def test_a_head_bias_is_refused_or_told(tmp_path):
    source, body, head = save_article(tmp_path / "source", BIAS)
    with pytest.raises(CheckpointError, match=r"bias of 0\.375.*--head-bias reward-mean"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    card = convert_checkpoint(source, tmp_path / "out", head_bias="reward-mean")
    rewards, scores = rewards_of(tmp_path / "out", text_ids()), article_scores(body, head, text_ids())
    np.testing.assert_allclose(rewards - card.reward_mean, scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rewards + card.training["head_bias"], scores, rtol=0, atol=1e-5)


def test_a_bias_and_a_measured_mean_go_together(tmp_path):
    source, body, head = save_article(tmp_path / "source", BIAS)
    scores = np.array(article_scores(body, head, text_ids()))
    config = json.loads((source / "config.json").read_text())
    statistics = {"mean": float(scores.mean()), "std": float(scores.std())}
    (source / "config.json").write_text(json.dumps({**config, **statistics}))
    card = convert_checkpoint(source, tmp_path / "out", head_bias="reward-mean")
    rewards = rewards_of(tmp_path / "out", text_ids())
    normalised = (rewards - card.reward_mean) / card.reward_std
    np.testing.assert_allclose(normalised, (scores - scores.mean()) / scores.std(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(rewards + card.training["head_bias"], scores, rtol=0, atol=1e-5)


def test_a_bias_of_zero_is_no_bias(tmp_path):
    source, body, head = save_article(tmp_path / "source", 0.0)
    card = convert_checkpoint(source, tmp_path / "out")
    assert card.reward_mean is None
    np.testing.assert_allclose(
        rewards_of(tmp_path / "out", text_ids()), article_scores(body, head, text_ids()), rtol=0, atol=1e-5
    )


# The files that README gives for --chat-template, and how each system joins a text.
OWN_ENCODINGS = {
    "deepspeed-chat": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}<|endoftext|>",
        lambda prompt, response: f"<s>{prompt}{response}<|endoftext|>",
    ),
    "trlx": (
        "<|startoftext|>{{ messages[0]['content'] }}{{ '\\n' }}{{ messages[1]['content'] }}",
        lambda prompt, response: f"<|startoftext|>{prompt}\n{response}",
    ),
}


@pytest.mark.parametrize("name", OWN_ENCODINGS)
def test_the_guide_gives_the_systems_own_encoding(name, tmp_path):
    template, text_of = OWN_ENCODINGS[name]
    assert template in Path("docs/converting.md").read_text(encoding="utf-8")
    body, head = random_reward_model("gpt2")
    backbone = FORMATS[name].backbones[0]
    source = save_foreign(tmp_path / "source", body, backbone, {HEAD: head.weight.data})
    (tmp_path / "own.jinja").write_text(template + "\n")
    convert_checkpoint(source, tmp_path / "out", chat_template=str(tmp_path / "own.jinja"))
    pairs = [("please explain", " of course"), ("no", ""), ("thank you very kindly", " go away")]
    encoder = load_critic(tmp_path / "out").encoder
    tokenizer = AutoTokenizer.from_pretrained(source)
    sequences = [tokenizer(text_of(*pair), add_special_tokens=False)["input_ids"] for pair in pairs]
    assert [one.ids for one in encoder.encode_batch(pairs)] == sequences


def test_texts_are_joined_plainly_by_default(tmp_path):
    body, head = random_reward_model("gpt2")
    source = save_foreign(tmp_path / "source", body, "transformer.", {HEAD: head.weight.data})
    convert_checkpoint(source, tmp_path / "out")
    assert load_critic(tmp_path / "out").encoder.render("please ", "go") == "please go"  # EOS is the pad token


def test_what_is_lacking_comes_from_the_base(tmp_path):
    body, head = random_reward_model("gpt2")
    base = save_foreign(tmp_path / "base", body, "", {})
    source = save_foreign(tmp_path / "source", body, "transformer.", {HEAD: head.weight.data})
    for lacking in ("config.json", "tokenizer_config.json"):  # a vocabulary alone would load, with another EOS
        (source / lacking).unlink()
        with pytest.raises(CheckpointError, match=rf"no {lacking}.*--base BASE_MODEL"):
            convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", base=str(base))
    expected = deepspeed_chat_scores(0)(body, head, text_ids())
    np.testing.assert_allclose(rewards_of(tmp_path / "out", text_ids()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_weights(tmp_path, dtype):
    body, head = random_reward_model("gpt2")
    body, head = body.to(dtype), head.to(dtype)
    source = save_foreign(tmp_path / "source", body, "transformer.", {HEAD: head.weight.data})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    convert_checkpoint(source, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    assert torch.equal(load_critic(tmp_path / "out").critic.model.score.weight, head.weight)


def test_auto_map_is_shipped(tmp_path):
    convert_checkpoint(save_native(tmp_path / "source"), tmp_path / "out", auto_map=True)
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())
    load_critic(tmp_path / "out")


def test_a_config_that_names_a_modeling_file_runs_none_of_it(tmp_path):
    source, *_ = save_article(tmp_path / "source", 0.0)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["LlamaRewardModel"]
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_llama_rm.LlamaRewardModel"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_llama_rm.py").write_text("raise RuntimeError('was run')")
    convert_checkpoint(source, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


Weights = dict[str, Any]


def another_key(weights: Weights) -> None:
    weights["rwtransformer.h.0.adapter.weight"] = torch.ones(3)


def a_key_less(weights: Weights) -> None:
    del weights["rwtransformer.h.1.ln_1.weight"]


def another_shape(weights: Weights) -> None:
    weights["rwtransformer.h.0.ln_1.weight"] = torch.ones(31)


def two_outputs(weights: Weights) -> None:
    weights[HEAD] = torch.ones(2, 32)


def both_spellings(weights: Weights) -> None:
    weights["rwtranrsformer.ln_f.weight"] = torch.ones(32)


def with_and_without_prefix(weights: Weights) -> None:
    weights["transformer.ln_f.weight"] = torch.ones(32)


def two_biases(weights: Weights) -> None:
    weights["v_head.bias"] = torch.ones(2)


def a_bias_that_is_nan(weights: Weights) -> None:
    weights["v_head.bias"] = torch.tensor([float("nan")])


def a_number_beside(weights: Weights) -> None:
    weights["epoch"] = 3


def no_head(weights: Weights) -> None:
    del weights[HEAD]


def code(weights: Weights) -> None:
    weights["hook"] = Path("x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_key, r"unexpected: h\.0\.adapter\.weight"),
        (a_key_less, r"missing: transformer\.h\.1\.ln_1\.weight"),
        (another_shape, r"shape: transformer\.h\.0\.ln_1\.weight: \(31,\) in the file, \(32,\) in the model"),
        (two_outputs, r"shape \(2, 32\), with 2 outputs"),
        (both_spellings, r"rwtransformer\.ln_f\.weight and rwtranrsformer\.ln_f\.weight are both"),
        (with_and_without_prefix, r"twice: ln_f\.weight and transformer\.ln_f\.weight"),
        (two_biases, r"bias is \[1\.0, 1\.0\], expected one finite number"),
        (a_bias_that_is_nan, r"bias is \[nan\], expected one finite number"),
        (a_number_beside, r"holds more than named weights \(epoch: int\)"),
        (code, r"holds more than weights"),
        (no_head, r"names of its weights \(rwtransformer\.\*\) do not match --from auto"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(tmp_path, damage, message):
    body, head = random_reward_model("gpt2")
    source = save_foreign(tmp_path / "source", body, "rwtransformer.", {HEAD: head.weight.data})
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    damage(weights)
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", head_bias="reward-mean")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_cut_short_are_refused(tmp_path):
    source = save_native(tmp_path / "source")
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 7)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_split_weights_are_read_by_their_index(tmp_path):
    body, head = random_reward_model("gpt2")
    source = save_foreign(tmp_path / "source", body, "rwtransformer.", {HEAD: head.weight.data})
    (source / "pytorch_model.bin").rename(source / "body.bin")
    weights = torch.load(source / "body.bin", weights_only=True)
    torch.save({HEAD: weights.pop(HEAD)}, source / "head.bin")
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(weights, "body.bin"), HEAD: "head.bin"}}))
    torch.save(weights, source / "body.bin")
    convert_checkpoint(source, tmp_path / "out")
    expected = deepspeed_chat_scores(0)(body, head, text_ids())
    np.testing.assert_allclose(rewards_of(tmp_path / "out", text_ids()), expected, rtol=0, atol=1e-5)
    index.write_text(index.read_text()[:-9])
    with pytest.raises(CheckpointError, match=r"index\.json: damaged, or not an index of weights"):
        convert_checkpoint(source, tmp_path / "again")


def test_another_format_than_was_said_is_refused(tmp_path):
    source = save_native(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"\(model\.\*, score\.\*\) do not match --from trlx \(trlx: transf"):
        convert_checkpoint(source, tmp_path / "out", "trlx")


def test_a_mean_that_is_no_number_is_refused(tmp_path):
    source = save_native(tmp_path / "source", mean="high")
    with pytest.raises(CheckpointError, match=r"config\.json: mean: 'high' is not valid"):
        convert_checkpoint(source, tmp_path / "out")
