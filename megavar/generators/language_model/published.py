"""Hugging Face's layout of Qwen2 (``Qwen2ForCausalLM``), alone or inside of a vision-language model."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavar.errors import CheckpointError
from megavar.generators.language_model.model import HasLanguageModel
from megavar.weight_layout import FolderPart, NamedLayout, Shape

EMBEDDING = "embed_tokens.weight"
_BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
    "attention.linear_qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attention.linear_qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "feed_forward.mlp.linear_fc1_gate.weight": ("mlp.gate_proj.weight",),
    "feed_forward.mlp.linear_fc1_up.weight": ("mlp.up_proj.weight",),
    "feed_forward.mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_ENDS = {"text.weight": (EMBEDDING,), "norm.weight": ("norm.weight",)}
_SETTINGS = {
    "vocabulary": "vocab_size", "width": "hidden_size", "heads": "num_attention_heads",
    "groups": "num_key_value_heads", "feed_forward": "intermediate_size", "norm_epsilon": "rms_norm_eps",
}  # fmt: skip
"""Keys of the section, and of ``config.json``."""
_NUMBERED = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.")


class Qwen2Layout(NamedLayout):
    """The decoder, under whatever prefix a file keeps it.

    ``model.`` in Qwen2 and Qwen2.5-VL, ``language_model.model.`` in InternVL. The rest of a file (head over text,
    vision tower, projector, blocks after the last that is kept) is passed over.
    """

    belongs_to = "a Qwen2 language model"
    remedy = (
        "Check generator.language_model against the folder's config.json, and name what the language model does not "
        "have in train.initial_weights.fresh."
    )
    choice: HasLanguageModel

    def names(self, name: str) -> tuple[str, ...]:
        """Without prefix."""
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            return _ENDS.get(name, ())
        return tuple(f"layers.{numbered[1]}.{part}" for part in _BLOCK.get(numbered[2], ()))

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Rows of a key's group lie together: its queries, its key, its value."""
        if ".linear_qkv." not in name:
            return [value]
        sizes = self.choice.language_model
        per_group = sizes.heads // sizes.groups
        rows = value.unflatten(0, (sizes.groups, per_group + 2, sizes.channels_of_head))
        return [part.flatten(0, 2) for part in rows.split([per_group, 1, 1], 1)]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        if ".linear_qkv." not in name:
            return super().join(name, parts)
        sizes = self.choice.language_model
        rows = [part.unflatten(0, (sizes.groups, -1, sizes.channels_of_head)) for part in parts]
        return torch.cat(rows, 1).flatten(0, 2)

    def made_with(self, path: Path) -> dict[str, Any] | None:
        """Of the ``config.json`` beside the weights. The number of blocks is not compared: fewer may be kept."""
        file = path / "config.json"
        if not file.is_file():
            return None
        try:
            tree = json.loads(file.read_text())
            text = next((tree[key] for key in ("text_config", "llm_config") if key in tree), tree)
            found = {key: text[name] for key, name in _SETTINGS.items() if name in text}
            rotary = text.get("rope_parameters") or text
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): fetch the folder again.") from error
        if "rope_theta" in rotary:
            found["rotary_base"] = float(rotary["rope_theta"])
        return {"language_model": found}

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The language model's tensors alone, without prefix: to be put into the folder that they came from."""
        return super().export({name: value for name, value in tensors.items() if self.names(name)})

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`WeightLayout.load`; of the file only the decoder's kept blocks count."""
        return super().load(self.within(state), expected, passed)

    def within(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The decoder's tensors of a file without their prefix, as many blocks as the model has.

        Raises:
            CheckpointError: the file has no language model, or several.
        """
        prefix = prefix_in(state)
        depth = self.choice.language_model.depth
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        parts = {name.partition(".")[0] for name in (*_ENDS["text.weight"], *_ENDS["norm.weight"])} | {"layers"}
        return {
            name: value for name, value in found.items()
            if name.partition(".")[0] in parts
            and ((layer := _LAYER.match(name)) is None or int(layer[1]) < depth)
        }  # fmt: skip


def language_model_of(choice: HasLanguageModel, tensors: Mapping[str, Tensor], folder: Path) -> FolderPart:
    """The trained language model, to be put into ``folder``, which keeps its head over text and its vision tower.

    Raises:
        CheckpointError: it has experts, for which Hugging Face's layout has no place.
    """
    if choice.language_model.experts is not None:
        raise CheckpointError(
            f"{folder} has no place for the experts of generator.language_model.experts: only dense language models "
            f"go back into the folder that they came from."
        )
    return FolderPart(Qwen2Layout(choice, None).export(tensors), choice.language_model.depth)


def prefix_in(names: Mapping[str, object]) -> str:
    """What stands before ``embed_tokens.weight`` in a file.

    Raises:
        CheckpointError: the file has no language model, or several.
    """
    found = [name.removesuffix(EMBEDDING) for name in names if name == EMBEDDING or name.endswith(f".{EMBEDDING}")]
    if len(found) != 1:
        raise CheckpointError(
            f"The file has {len(found) or 'no'} tensors named {EMBEDDING}: it is no language model of Hugging Face's "
            f"layout. Give a folder with config.json and model.safetensors, or the weights' own layout."
        )
    return found[0]
