"""Small random language models made by transformers' own classes, in folders, and ours that read them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.language_model import LanguageModelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, TokenSequence
from megavar.generators.language_model import LanguageModel, positions_of
from megavar.generators.language_model.published import Qwen2Layout
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.transformer.sequence import SequenceLayout
from megavar.weight_file import read_weights_file

SIZES = {"vocabulary": 160, "width": 48, "depth": 3, "heads": 4, "groups": 2, "feed_forward": 96}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SPACE = TokenSpace("latent", (2,), 4, None, 8, image_side=32)


class TextConfig(GeneratorChoice):
    """A language model alone."""

    name: Literal["tests_text"] = "tests_text"
    language_model: LanguageModelConfig = LanguageModelConfig(**SIZES)
    attention_kernel: str = "auto"

    def limits(self, space: TokenSpace | None) -> Limits:
        return self.language_model.limits


@dataclass
class Texts:
    ids: Tensor
    valid: Tensor | None = None
    """While decoding with the rows of the cache."""
    positions: Tensor | None = None
    sample_keys: None = None


class Text(LanguageModel):
    """Hidden states of texts, float32 [B, L, C]."""

    def sequence(self, inputs: Texts) -> TokenSequence:
        positions = inputs.positions
        if positions is None:
            shape = inputs.ids.shape
            positions = torch.arange(shape[1]).expand(shape) if inputs.valid is None else positions_of(inputs.valid)
        layout = SequenceLayout((inputs.ids.shape[1],), rule="causal")
        return TokenSequence(layout, self.rotary(positions), inputs.valid)

    def embed(self, inputs: Texts) -> Embedded:
        return Embedded(self.text(inputs.ids))

    def predict(self, hidden: Tensor, conditions: Any, inputs: Texts) -> Tensor:
        return self.norm(hidden).float().transpose(0, 1)

    def gather(self, prediction: Tensor) -> Tensor:
        return prediction

    def example(self, images: int) -> Texts:
        return Texts(torch.zeros(images, 8, dtype=torch.int64))


def text_sizes(**changes: Any) -> dict[str, Any]:
    """Of transformers' configuration of the same model."""
    s = SIZES | changes
    return {
        "vocab_size": s["vocabulary"], "hidden_size": s["width"], "num_hidden_layers": s["depth"],
        "rms_norm_eps": 1e-6,
        "num_attention_heads": s["heads"], "num_key_value_heads": s["groups"], "intermediate_size": s["feed_forward"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6} | s.get("rope", {}),
    }  # fmt: skip


def foreign(kind: str, tied: bool) -> nn.Module:
    """transformers' model with large random weights, so that every part matters."""
    import transformers as hf

    torch.manual_seed(7)
    if kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**text_sizes(), tie_word_embeddings=tied))
    elif kind == "internvl":
        vision = VISION | {"patch_size": [14, 14], "image_size": [56, 56], "num_channels": 3}
        text = {"model_type": "qwen2", "tie_word_embeddings": tied, **text_sizes()}
        model = hf.InternVLForConditionalGeneration(
            hf.InternVLConfig(
                vision_config=vision, text_config=text, image_token_id=150, image_seq_length=4,
                tie_word_embeddings=tied,
            )
        )  # fmt: skip
    else:
        vision = {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 48}
        rope = {"mrope_section": [2, 2, 2]}
        text = {"model_type": "qwen2_5_vl_text", "tie_word_embeddings": tied, **text_sizes(rope=rope)}
        model = hf.Qwen2_5_VLForConditionalGeneration(
            hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def ours(folder: Any = None, **changes: Any) -> Text:
    """Our model, with the weights of a folder."""
    choice = TextConfig(language_model=LanguageModelConfig(**(SIZES | changes)))
    model = Text(choice, SPACE)
    if folder is not None:
        fill(model, read_weights_file(folder, shapes_of(model), {"qwen2": Qwen2Layout(choice, SPACE)}))
    return model
