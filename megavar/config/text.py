"""How the captions of text-image pairs become token ids."""

from pathlib import PurePath

from pydantic import Field, field_validator

from megavar.config.base import PathText, Section


class TextConfig(Section):
    """A text per image, T token ids: template(request(caption)), padded on the right.

    The defaults are VGT's (hustvl/VGT ``src/datasets/text2image``), but for the chat template around the request, which
    is the language model's own.
    """

    tokenizer: PathText | None = None
    """``tokenizer.json`` of a Hugging Face folder, or the folder. Default, for the embedded ``shapes`` only: a
    byte-level BPE, trained on the spot on captions of the source; the run keeps it in ``RUN/text_tokenizer``."""
    vocabulary: int = Field(512, ge=272)
    """Largest number of entries of a tokenizer that is trained on the spot: 256 bytes, special tokens, and words."""
    length: int = Field(256, ge=1)
    """Tokens of a text, T (VGT: 256). Of longer ones the end of the caption is cut, never the template."""
    padding: int | None = Field(None, ge=0)
    """Id that pads. Default: the folder's padding token. VGT's code pads with 0, which its decoding sees."""
    template: str = "{request}"
    """What stands around the request: the language model's chat template, as plain text with special tokens."""
    request: str = "Generate an image: {caption}"
    """What is asked for (VGT's words)."""
    request_without: str = "Generate an image."
    """The request where there is no caption: dropped ones, samples without, classifier-free guidance (VGT's words)."""

    @field_validator("tokenizer")
    @classmethod
    def _file(cls, value: str | None) -> str | None:
        return value if value is None or value.endswith(".json") else str(PurePath(value) / "tokenizer.json")

    @field_validator("template")
    @classmethod
    def _has_request(cls, value: str) -> str:
        if value.count("{request}") != 1:
            raise ValueError(f"{value!r} must contain {{request}} once: it stands for what is asked for")
        return value

    @field_validator("request")
    @classmethod
    def _has_caption(cls, value: str) -> str:
        if value.count("{caption}") != 1:
            raise ValueError(f"{value!r} must contain {{caption}} once")
        return value
