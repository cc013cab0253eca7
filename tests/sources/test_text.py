"""Captions to token ids: templates, cutting, padding, folders in the Hugging Face format, workers, sampling."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer

from megavar.conditions import PromptConditions
from megavar.config.data import DataConfig, DigitsSource, ShapesSource
from megavar.config.loading import load_config
from megavar.config.text import TextConfig
from megavar.data import text_training
from megavar.data.build import build_loader, build_source, build_text
from megavar.data.text import TextEncoder
from megavar.errors import ConfigError, DataError

CHAT = "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
CONFIG = DataConfig(source=ShapesSource(length=600), image_size=32, text=TextConfig(length=24, template=CHAT))
ENCODER = build_text(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text_training.save(ENCODER.tokenizer, folder)
    return folder


def named(folder, **settings):
    return TextEncoder.read(TextConfig(tokenizer=str(folder), **{"length": 24, "template": CHAT} | settings))


def test_transformers_reads_the_folder_and_agrees(folder):
    """Ids, padding and special tokens; also of words and letters that training did not see."""
    captions = ["a photo of a red circle and a blue square", "ein Zebra für 42 ünïcode 象"]
    texts = [CHAT.replace("{request}", f"Generate an image: {caption}") for caption in captions]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts, padding="max_length", max_length=64, return_tensors="pt")
    ours = named(folder, length=64).encode(captions)
    assert torch.equal(ours.ids, expected.input_ids)
    assert torch.equal(ours.mask, expected.attention_mask.bool())
    assert theirs.decode(ours.ids[1][ours.mask[1]]) == texts[1]
    assert len(theirs) == ENCODER.size
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Generate an image."}], add_generation_prompt=True, tokenize=False
    )
    assert chat == CHAT.replace("{request}", "Generate an image.")


def test_a_tokenizer_trained_on_the_spot_is_a_function_of_its_source(folder):
    build_text.cache_clear()
    again = build_text(CONFIG)
    assert again.tokenizer.to_str() == ENCODER.tokenizer.to_str()
    assert (folder / "tokenizer.json").read_text() == again.tokenizer.to_str(pretty=True)
    assert ENCODER.size <= CONFIG.text.vocabulary
    assert ENCODER.tokenizer.encode("<img>").ids == [ENCODER.id("<img>")] == [6]


def test_a_long_caption_loses_its_end_and_the_template_stays():
    caption = "a photo of a red circle left of a blue square and then a very long story of nothing " * 3
    ids, mask = ENCODER.encode([caption, ""])
    assert mask[0].sum() > CONFIG.text.length - 3
    whole = ENCODER.tokenizer.decode(ids[0][mask[0]].tolist(), skip_special_tokens=False)
    before, after = CHAT.split("{request}")
    assert whole.startswith(f"{before}Generate an image: a photo of a red") and whole.endswith(after)
    assert ENCODER.tokenizer.decode(ids[1][mask[1]].tolist(), skip_special_tokens=False) == CHAT.replace(
        "{request}", "Generate an image."
    )


def test_padding_is_the_folders_own(folder, tmp_path):
    assert (named(folder).encode([""]).ids[0, -1]) == ENCODER.id("<|endoftext|>")
    shutil.copytree(folder, tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer_config.json").read_text()
    (tmp_path / "other" / "tokenizer_config.json").write_text(text.replace("endoftext", "im_end"))
    assert (named(tmp_path / "other").encode([""]).ids[0, -1]) == ENCODER.id("<|im_end|>")
    assert named(folder, padding=11).encode([""]).ids[0, -1] == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_token_ids(workers):
    """The same in worker processes; text and captions go together through batches' operations."""
    config = CONFIG.model_copy(update={"workers": workers})
    loader = build_loader(
        config, build_source(config), seed=1, global_batch_size=6, micro_batch_size=3, stop_step=2
    )
    for batch in (batch for step in loader for batch in step):
        expected = ENCODER.encode(batch.captions)
        assert torch.equal(batch.text_ids, expected.ids) and torch.equal(batch.text_mask, expected.mask)
        second = batch.split(1)[1]
        assert torch.equal(second.text_ids, expected.ids[1:2]) and second.captions == batch.captions[1:2]


def test_conditions_drop_their_text():
    condition = PromptConditions("test", ("a photo of a ring", "a photo of two bars")).at(torch.arange(2))
    condition = condition.encoded(ENCODER)
    both = condition.with_dropped()
    assert torch.equal(both.text.ids, torch.cat([condition.text.ids, ENCODER.encode(["", ""]).ids]))
    assert torch.equal(condition.dropped().text.mask, ENCODER.encode(["", ""]).mask)
    assert both.captions == ("a photo of a ring", "a photo of two bars", "", "")


def test_errors_name_key_and_remedy(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.text\.tokenizer is not set.*shapes.*'digits'"):
        build_text(DataConfig(source=DigitsSource(), text=TextConfig()))
    with pytest.raises(DataError, match="does not exist"):
        named(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="damaged or no tokenizer"):
        named(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.text\.length=4, but template and request alone have \d+ tokens"):
        named(folder, length=4)
    with pytest.raises(ConfigError, match="no token '<nothing>'"):
        ENCODER.id("<nothing>")
    with pytest.raises(ConfigError, match=r"must contain \{caption\} once"):
        load_config("configs/quickstart.yaml", ["data.text.request=draw"])


def test_the_package_is_optional(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'megavar\[vlm\]'"):
        TextEncoder.read(TextConfig(tokenizer="somewhere"))
