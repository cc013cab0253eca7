"""A small text tokenizer trained on the spot: Qwen2's kind (byte-level BPE), for embedded data.

It is a function of the captions and the number of entries. :func:`save` writes the folder as transformers would, whose
``AutoTokenizer`` reads it.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavar.data.text import require_tokenizers
from megavar.storage import write_bytes_atomic, write_json_atomic

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's rule for words."""
PADDING, END = "<|endoftext|>", "<|im_end|>"
SPECIAL = (
    PADDING, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<img>", "</img>",
    "<IMG_CONTEXT>",
)  # fmt: skip
"""Qwen2.5-VL's and InternVL3's special tokens; their ids are their places here, so that ``<img>`` is 6."""
_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE of at most ``vocabulary`` entries, special tokens included (``tokenizers.Tokenizer``), which it
    does not look for in ``texts``.

    Raises:
        ConfigError: the package tokenizers is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else forked workers warn of its threads
    tokenizers = require_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    tokenizer.train_from_iterator((special.sub(" ", text) for text in texts), trainer)
    return tokenizer


def save(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer`` into ``folder`` in the Hugging Face format."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PADDING,
        "eos_token": END,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT,
    }
    write_json_atomic(folder / "tokenizer_config.json", described)
    write_json_atomic(folder / "special_tokens_map.json", {"pad_token": PADDING, "eos_token": END})
