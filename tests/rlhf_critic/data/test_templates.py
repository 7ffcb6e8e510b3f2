"""Shipped templates give the ids of the systems that they are named after, and a changed template renders the same."""

import datetime
import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_critic.config.model import EncodingConfig
from rlhf_critic.data.encoding import Encoder, create_encoder, load_tokenizer
from rlhf_critic.data.templates import PINNED_DATE_MACRO, changed, template_name, without_trailing
from rlhf_critic.errors import EncodingError
from tests.helpers import WORDS, save_tiny_tokenizer

PAIRS = [("please explain", " of course"), ("", "no"), (" kindly", "\n"), ("\nplease", "glad\n\n"), ("1", "▁of\u00a0x")]
SPACES = {
    "legacy": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
}


def save_sentencepiece(directory: Path, spaces: str, adds_eos: bool = False) -> str:
    """Saves a tokenizer as those of Llama 2 and Mistral: spaces are ``▁``, unknown characters bytes, BOS is added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *pieces], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    backend.normalizer, backend.pre_tokenizer = SPACES[spaces]  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if adds_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("spaces", SPACES)
def test_a_plain_text_has_the_ids_that_a_sentencepiece_tokenizer_gives_it(spaces, tmp_path):
    source = save_sentencepiece(tmp_path / "source", spaces)
    own = AutoTokenizer.from_pretrained(source)
    encoder = Encoder(load_tokenizer(source), 64)  # it has no template, so auto is plain
    expected = [own(f"{prompt}{response}</s>")["input_ids"] for prompt, response in PAIRS]
    assert all(ids[0] == own.bos_token_id and ids[1] != own.bos_token_id for ids in expected)
    assert [one.ids for one in encoder.encode_batch(PAIRS)] == expected
    encoder.save(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for (prompt, response), ids in zip(PAIRS, expected, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = plain.apply_chat_template(messages, tokenize=False)
        assert plain(text)["input_ids"] == plain(text, add_special_tokens=False)["input_ids"] == ids


def test_an_eos_that_a_tokenizer_adds_itself_is_not_doubled(tmp_path):
    source = save_sentencepiece(tmp_path / "source", "first", adds_eos=True)
    own = AutoTokenizer.from_pretrained(source)
    assert Encoder(load_tokenizer(source), 64).encode("please", " no").ids == own("please no")["input_ids"]


def test_a_begin_that_cannot_be_written_as_text_is_refused(tmp_path):
    source = Path(save_tiny_tokenizer(tmp_path / "source", adds_bos=True))
    saved = json.loads((source / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["single_word"] = token["content"] == "<s>"  # so "<s>a" is not BOS and a
    (source / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(EncodingError, match=r"adds '<s>' in front of texts.*pass its file in chat_template"):
        load_tokenizer(str(source), "plain")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_directory_with_a_sentencepiece_model_alone_names_the_optional_dependency(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    with pytest.raises(EncodingError, match=r"tokenizer\.model.*pip install 'rlhf-critic\[sentencepiece\]'"):
        load_tokenizer(str(tmp_path))


CONVERSATIONS = [
    [{"role": "user", "content": "please explain\n"}, {"role": "assistant", "content": " of course "}],
    [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "glad"},
        {"role": "user", "content": "1 2"},
        {"role": "assistant", "content": "thank\n\nyou"},
    ],
]


def test_a_changed_template_renders_what_it_rendered_before(tokenizer_dir):
    """The templates that TRL ships stand for those of the families."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir())
    rendered = 0
    paths = sorted(files("trl").joinpath("chat_templates").iterdir(), key=lambda path: path.name)
    for path in paths[::7]:
        template = path.read_text(encoding="utf-8")
        for messages in CONVERSATIONS:
            texts = []
            for source in (template, changed(template, "{{ text }}")):
                try:
                    texts.append(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))
                except TemplateError as error:  # a template that rejects these conversations
                    texts.append(f"refused: {error}")
            assert texts[0] == texts[1], path.name
            rendered += "refused" not in texts[0]
    assert rendered > 5


def openrlhf_text(text: str, eos: str) -> str:
    """Returns a text as OpenRLHF's ``RewardDataset`` of 0.11.2 ends it."""
    text = text.rstrip("\n")
    return text if text.endswith(eos) else f"{text} {eos}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}",
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n\n{% endfor %}",
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}",
        None,
    ],
)
@pytest.mark.parametrize("name", ["openrlhf", "openrlhf-plain"])
def test_openrlhfs_encodings_are_those_of_its_dataset(name, template, tokenizer_dir):
    source = tokenizer_dir(chat_template=template, adds_bos=True)
    own = AutoTokenizer.from_pretrained(source)
    encoder = Encoder(load_tokenizer(source, name), 64)
    for prompt, response in [*PAIRS, ("please", "no</s>"), ("please ", "no</s>\n")]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        joined = name == "openrlhf-plain" or template is None
        text = prompt + response if joined else own.apply_chat_template(messages, tokenize=False)
        expected = own(openrlhf_text(text, "</s>"), add_special_tokens=False)["input_ids"]
        assert encoder.encode(prompt, response).ids == expected
        assert expected[-1] == own.eos_token_id


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_articles_encoding_is_its_text_form(adds_bos, tokenizer_dir):
    source = tokenizer_dir(adds_bos=adds_bos)
    own = AutoTokenizer.from_pretrained(source)
    encoder = Encoder(load_tokenizer(source, "article"), 64)
    for prompt, response in PAIRS:
        expected = own(prompt + " " + response + "\n<|im_end|>")["input_ids"]
        assert encoder.encode(prompt, response).ids == expected
    turns = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}]
    assert encoder.render(turns, "of course").endswith("no 1 2 of course\n<|im_end|>")


@pytest.mark.parametrize("text", ["", "glad", "</s>glad</s></s>", "</s>", "glad</s> ", "glad</s>\n</s>", "</s" * 3])
def test_a_trailing_token_is_removed_as_often_as_it_is_there(text, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir(), "plain")
    tokenizer.chat_template = without_trailing(tokenizer.chat_template, "</s>")
    expected = f"please{text}"
    while expected.endswith("</s>"):
        expected = expected.removesuffix("</s>")
    encoder = Encoder(tokenizer, 64)
    assert encoder.render("please", text) == expected
    assert encoder.ending == ""
    assert encoder.open("please") == "please"


def test_a_pinned_date_stays_in_front(tokenizer_dir, tmp_path):
    template = "{{ strftime_now('%Y') }} {{ messages[-1]['content'] }}\n"
    encoder = Encoder(load_tokenizer(tokenizer_dir(chat_template=template), "openrlhf"), 64)
    assert encoder.render("please", "no") == "01 Jan 2025 no </s>"
    encoder.tokenizer.chat_template = without_trailing(encoder.tokenizer.chat_template, "</s>")
    assert encoder.render("please", "no") == "01 Jan 2025 no "
    assert encoder.tokenizer.chat_template.count(PINNED_DATE_MACRO) == 1
    encoder.save(tmp_path / "saved")
    again = Encoder(load_tokenizer(str(tmp_path / "saved")), 64)
    assert again.fingerprint == Encoder(encoder.tokenizer, 64).fingerprint


def test_the_date_of_a_template_is_fixed_or_todays_and_stays_so(tokenizer_dir, tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}"
    source = tokenizer_dir(chat_template=template)
    today = datetime.date.today().strftime("%d %b %Y")
    dates = {"fixed": "01 Jan 2025", "today": today}
    for template_date, date in dates.items():
        encoder = create_encoder(source, EncodingConfig(template_date=template_date))
        assert encoder.render("a", "b") == f"{date} b"
        encoder.save(tmp_path / template_date)
        saved = Encoder(load_tokenizer(str(tmp_path / template_date), keeps_template=True), 1024, "text")
        assert saved.fingerprint == encoder.fingerprint
        assert saved.render("a", "b") == f"{date} b"


@pytest.mark.parametrize(
    ("own", "choice", "name"),
    [(None, "auto", "plain"), ("{{ messages[-1]['content'] }}", "auto", "auto"), (None, "openrlhf", "openrlhf")],
)
def test_a_chosen_template_has_the_name_of_what_was_chosen(own, choice, name, tokenizer_dir):
    source = tokenizer_dir(chat_template=own)
    assert template_name(choice, load_tokenizer(source, choice)) == name
