"""A small vision-language model, in the place of a pretrained one, for demonstrations of VGT on the ``shapes`` source.

    python -m tools.small_vlm configs/vgt/demo.yaml [key=value ...]

writes the Hugging Face folder that ``train.initial_weights.path`` of the configuration names, InternVL as transformers
builds it, with the sizes of ``tokenizer.encoder`` and ``generator.language_model``, and a text tokenizer; it
learns for two minutes to name what scenes show, which is all that it understands. A finished folder is left as it is.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.config.shapes import TAGS, ShapesSource
from megavar.data import text_training
from megavar.data.build import build_source
from megavar.data.pixels import to_float
from megavar.data.source import Source
from megavar.errors import ConfigError, ExitCode, missing_package
from megavar.parallel.environment import limit_threads
from megavar.paths import as_path
from megavar.storage import write_json_atomic
from tools.outcome import outcome

RECORD = "understanding.json"
"""Written last: what the model has learned."""
_CAPTIONS = 20_000
_CONTEXT, _END = (text_training.SPECIAL.index(token) for token in ("<IMG_CONTEXT>", text_training.END))
_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of colours in [0, 1], by which InternVL's encoder sees them."""
_IGNORED = -100
"""Of labels that do not count (transformers)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.small_vlm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=as_path, metavar="CONFIG", help="of the run that begins with the model")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=500, help="of learning (default: 500); 0 leaves random weights")
    parser.add_argument("--batch", type=int, default=64, help="scenes of a step (default: 64)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: 0.001)")
    options = parser.parse_args(arguments)
    return outcome("small_vlm", lambda: make(load_config(options.config, options.overrides), options))


def make(config: Config, options: argparse.Namespace) -> int:
    """Build, teach, test and save it.

    Raises:
        ConfigError: the configuration names no folder, or other networks; or a package is missing.
    """
    initial = config.train.initial_weights
    if initial is None or config.data.text is None:
        raise ConfigError("Set train.initial_weights.path to the folder to make, and data.text: the run reads both.")
    folder = Path(initial.path)
    if (folder / RECORD).exists():
        print(f"{folder} is there already.")
        return ExitCode.FINISHED
    limit_threads(config.train.cpu_threads)
    torch.manual_seed(config.train.seed)
    data = config.data
    if isinstance(data.source, ShapesSource):  # it knows more than what it will draw
        data = data.model_copy(update={"source": data.source.model_copy(update={"tags": TAGS})})
    source = build_source(data)
    captions = [source.read(index).caption or "" for index in range(min(len(source), _CAPTIONS))]
    text = config.data.text
    whole = [text.template.format(request=text.request.format(caption=caption)) for caption in captions[:2000]]
    tokenizer = text_training.train([*whole, *captions], text.vocabulary)
    model = build(config)
    began = time.process_time()
    teach(model, tokenizer, source, options)
    understood = test(model, tokenizer, build_source(data, "test"))
    model.save_pretrained(folder)
    text_training.save(tokenizer, folder)
    found = {"steps": options.steps, "processor_seconds": round(time.process_time() - began, 1), **understood}
    write_json_atomic(folder / RECORD, found)
    print(f"{folder}: {json.dumps(found)}")
    return ExitCode.FINISHED


def build(config: Config) -> Any:
    """transformers' model, with random weights of which every layer says something."""
    try:
        from transformers import InternVLConfig, InternVLForConditionalGeneration
    except ImportError as error:
        raise missing_package("transformers", "tools.small_vlm") from error
    images: Any = config.tokenizer
    sizes: Any = getattr(images, "encoder", None)
    words: Any = getattr(config.generator, "language_model", None)
    if not hasattr(sizes, "qk_normalization") or words is None:
        raise ConfigError("tools.small_vlm makes InternVL: set tokenizer.name=vgt_ae with encoder.name=intern_vit, and "
                          "generator.name=query_ar.")  # fmt: skip
    if images.semantic_width != words.width:
        raise ConfigError("tokenizer.semantic_width is the width that generator.language_model reads: make them equal.")
    vision = {
        "hidden_size": sizes.width, "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.feed_forward, "patch_size": [sizes.patch] * 2, "image_size": [images.image_side] * 2,
        "attention_bias": sizes.qkv_bias, "use_qk_norm": sizes.qk_normalization, "norm_type": sizes.norm,
        "layer_norm_eps": sizes.norm_epsilon, "hidden_act": sizes.activation, "use_mean_pooling": True,
    }  # fmt: skip
    language = {
        "model_type": "qwen2", "vocab_size": words.vocabulary, "hidden_size": words.width,
        "num_hidden_layers": words.depth, "num_attention_heads": words.heads, "num_key_value_heads": words.groups,
        "intermediate_size": words.feed_forward, "rms_norm_eps": words.norm_epsilon, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": words.rotary_base},
    }  # fmt: skip
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision, text_config=language, image_token_id=_CONTEXT, image_seq_length=images.space.length,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lambda_" in name:
                value.fill_(1.0)
            elif value.ndim > 1 and "embed_tokens" not in name:
                value.normal_(std=math.prod(value.shape[1:]) ** -0.5 if "token" not in name else 0.02)
    return model


def teach(model: Any, tokenizer: Any, source: Source, options: argparse.Namespace) -> None:
    """Captions of scenes, by AdamW with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    total = options.steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=total, pct_start=0.1)
    order = torch.randint(len(source), (options.steps, options.batch))
    for step, indices in enumerate(order.tolist()):
        pixels, ids, labels, seen = _batch(tokenizer, [source.read(index) for index in indices], model)
        loss = model(input_ids=ids, pixel_values=pixels, attention_mask=seen, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{options.steps}  loss {float(loss.detach()):.3f}", flush=True)


def _batch(tokenizer: Any, samples: Sequence[Any], model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels as the encoder reads them; ids int64 [B, T]: places of the image, caption, end, padding; labels; mask."""
    images = to_float(torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples]))
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in _COLOURS)
    texts = [[*encoded.ids, _END] for encoded in tokenizer.encode_batch([sample.caption for sample in samples])]
    places, longest = [_CONTEXT] * model.config.image_seq_length, max(map(len, texts))
    ids = torch.tensor([[*places, *text, *[0] * (longest - len(text))] for text in texts])
    seen = torch.tensor([[1] * (len(places) + len(text)) + [0] * (longest - len(text)) for text in texts])
    labels = ids.masked_fill((seen == 0) | (torch.arange(ids.shape[1]) < len(places)), _IGNORED)
    return ((images + 1) / 2 - mean) / deviation, ids, labels, seen


@torch.no_grad()
def test(model: Any, tokenizer: Any, source: Source, count: int = 256) -> dict[str, float]:
    """On scenes of the test split: loss per token, and share of the tokens that are the likeliest ones, with the scene
    and with the next one in its place."""
    model.eval()
    samples = [source.read(index) for index in range(min(count, len(source)))]
    pixels, ids, labels, seen = _batch(tokenizer, samples, model)
    found: dict[str, float] = {}
    for name, given in (("", pixels), ("_of_another_scene", pixels.roll(1, 0))):
        output = model(input_ids=ids, pixel_values=given, attention_mask=seen, labels=labels)
        counted = labels[:, 1:] != _IGNORED
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].float().mean()
        found |= {f"loss{name}": round(float(output.loss), 4), f"right{name}": round(float(right), 4)}
    return found


if __name__ == "__main__":
    sys.exit(main())
