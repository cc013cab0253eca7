"""Small vision-language models with processors, in folders as transformers keeps them, and models whose answers are
planted."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megavar.data import text_training

TEXTS = ["Yes No A B C D cat dog two stop . , \n Answer the question using a single word or phrase ."] * 3
IMAGE_TOKENS = {"internvl": "<IMG_CONTEXT>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor(kind: str) -> Any:
    """transformers' processor of ``kind``: images of 28 pixels are 4 tokens."""
    import transformers as hf

    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=text_training.train(TEXTS, 340), pad_token=text_training.PADDING, eos_token=text_training.END,
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>",
                              "context_image_token": "<IMG_CONTEXT>"} if kind == "internvl" else {},
    )  # fmt: skip
    chat = _CHAT.replace("IMAGE", IMAGE_TOKENS[kind])
    if kind == "internvl":
        from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

        images = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False)
        return hf.InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=chat)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    images = hf.Qwen2VLImageProcessor(patch_size=7, min_pixels=28 * 28, max_pixels=28 * 28)
    return hf.Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=chat)


def model(kind: str, tokenizer: Any, **sizes: Any) -> nn.Module:
    """transformers' model with random weights, of the given sizes of its language model."""
    import transformers as hf

    torch.manual_seed(3)
    text = {
        "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
        | ({} if kind == "internvl" else {"mrope_section": [1, 1, 2]}),
    } | sizes  # fmt: skip
    place = tokenizer.convert_tokens_to_ids
    if kind == "internvl":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                  "patch_size": [7, 7], "image_size": [28, 28], "attention_bias": True}  # fmt: skip
        config = hf.InternVLConfig(
            vision_config=vision, text_config={"model_type": "qwen2"} | text, image_token_id=place("<IMG_CONTEXT>"),
            image_seq_length=4, tie_word_embeddings=False,
        )  # fmt: skip
        made: nn.Module = hf.InternVLForConditionalGeneration(config)
    else:
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 7,
                  "window_size": 28, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [0]}  # fmt: skip
        config = hf.Qwen2_5_VLConfig(
            vision_config=vision, text_config={"model_type": "qwen2_5_vl_text"} | text, tie_word_embeddings=False,
            image_token_id=place("<|image_pad|>"), vision_start_token_id=place("<|vision_start|>"),
            vision_end_token_id=place("<|vision_end|>"),
        )  # fmt: skip
        made = hf.Qwen2_5_VLForConditionalGeneration(config)
    for parameter in made.parameters():  # transformers begins with zeros in places
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def plant(made: nn.Module, tokenizer: Any, follows: dict[str, dict[str, float]]) -> None:
    """Let the next token follow from the last one alone: ``{last: {next: logit}}``; all other logits are 0."""
    text = made.model.language_model
    with torch.no_grad():
        for block in text.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        text.norm.weight.fill_(1.0)
        made.lm_head.weight.zero_()
        for number, (last, following) in enumerate(follows.items()):
            vector = torch.zeros(text.config.hidden_size)
            vector[number] = 1.0
            text.embed_tokens.weight[one_token(tokenizer, last)] = vector
            for token, logit in following.items():
                made.lm_head.weight[one_token(tokenizer, token)] += vector * logit / len(vector) ** 0.5


def one_token(tokenizer: Any, text: str) -> int:
    (number,) = tokenizer.encode(text, add_special_tokens=False)
    return int(number)


def write(folder: Path, kind: str, follows: dict[str, dict[str, float]] | None = None, **sizes: Any) -> Path:
    """A folder with a model that answers as planted, or with random weights."""
    reader = processor(kind)
    made = model(kind, reader.tokenizer, **sizes)
    if follows is not None:
        plant(made, reader.tokenizer, follows)
    made.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder
