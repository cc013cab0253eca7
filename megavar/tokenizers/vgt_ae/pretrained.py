"""Vision encoders of local Hugging Face folders, decoders of local diffusers folders, by the names in the files.

What else such a folder holds (the language model, its head, an encoder of the decoder's) is not read into memory.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from megavar.config.tokenizers.vgt_ae import InternViTConfig, SDVAEDecoderConfig, VGTAEConfig
from megavar.errors import CheckpointError
from megavar.tokenizers.vgt_ae.model import VGTAE
from megavar.tokenizers.vgt_ae.published import apart, internvit_name, joined
from megavar.weight_file import read_state_dict
from megavar.weight_folder import files_of, is_weight_folder, read_folder
from megavar.weight_layout import FolderPart, differences

_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
"""Our numbers of InternVL's projector, in transformers' names."""
_VISION = ("vision_model.", "mlp1.", "vision_tower.", "multi_modal_projector.", "visual.")
"""Beginnings of the names of vision encoders, perhaps after ``model.``."""
_DECODER_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors")


def load_encoder(model: VGTAE, folder: str, *, key: str) -> None:
    """Fill ``model.encoder`` from a vision-language model: InternVL's own folder or transformers' form of it
    (``InternVL3-1B-hf``), or Qwen2.5-VL's.

    Args:
        key: of the configuration that names the folder, for errors.

    Raises:
        CheckpointError: it is no such folder, or of another model.
    """
    path = Path(folder)
    if not is_weight_folder(path):
        raise CheckpointError(
            f"{key}: {folder} is no Hugging Face folder (model.safetensors, or numbered files with an index). Fetch "
            f"the vision-language model and name its folder."
        )
    read = read_folder(path, lambda name: name.removeprefix("model.").startswith(_VISION))
    state = {name.removeprefix("model."): value for name, value in read.items()}
    internvit = isinstance(model.config.encoder, InternViTConfig)
    state = apart(state) if internvit else state  # Qwen's own modules have one tensor of the three, too
    names = _names(list(model.encoder.state_dict()), internvit)
    form = max(names, key=lambda form: len(form.keys() & state.keys()))
    parts = {name.partition(".")[0] for name in form}
    found = {form.get(name, name): value for name, value in state.items() if name.partition(".")[0] in parts}
    _fill(model.encoder, found, f"{key}: {folder} does not hold the configured vision encoder")


def encoder_of(config: VGTAEConfig, tensors: Mapping[str, Tensor], folder: Path) -> FolderPart:
    """The trained encoder, InternVL's projector included, to be put into ``folder`` in the place of its own."""
    there = {name.removeprefix("model.") for name in files_of(folder)}
    own = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    forms = _names(list(own), isinstance(config.encoder, InternViTConfig))
    named = [joined({theirs: own[ours] for theirs, ours in form.items()}) for form in forms]
    return FolderPart(max(named, key=lambda form: len(form.keys() & there)))


def _names(ours: list[str], internvit: bool) -> list[dict[str, str]]:
    """Our names of an encoder's tensors by those of the files; one table for each form of a folder."""
    if not internvit:
        return [{name.replace("tower.", "visual.", 1): name for name in ours}]
    own, theirs = {}, {}
    for name in ours:
        part, _, inner = name.partition(".")
        number, _, kind = inner.partition(".")
        if part == "tower":
            own[f"vision_model.{internvit_name(inner)}"] = name
            theirs[f"vision_tower.{inner}"] = name
        else:
            own[f"mlp1.{inner}"] = name
            theirs[f"multi_modal_projector.{_PROJECTOR[number]}.{kind}"] = name
    return [own, theirs]


def load_decoder(model: VGTAE, place: str, *, key: str) -> None:
    """Fill ``model.decoder`` from a diffusers folder or its file. A decoder of Stable Diffusion keeps its own first
    convolution where the file's reads another number of channels.

    Args:
        key: of the configuration that names the folder, for errors.

    Raises:
        CheckpointError: it holds no such decoder.
    """
    path = Path(place)
    if path.is_dir():
        path = next((path / name for name in _DECODER_FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise CheckpointError(
            f"{key}: {place} is no diffusers folder ({', '.join(_DECODER_FILES)}). Fetch the autoencoder, and name its "
            f"folder or file."
        )
    tensors = read_state_dict(path, f"Weights of the decoder ({key})")
    found = {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}
    first = "conv_in.weight"
    own = model.decoder.state_dict()
    if isinstance(model.config.decoder, SDVAEDecoderConfig) and found.get(first, own[first]).shape != own[first].shape:
        found[first] = own[first]
    _fill(model.decoder, found, f"{key}: {place} does not hold the configured decoder")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], problem: str) -> None:
    own = module.state_dict()
    wrong = differences(*({name: tuple(value.shape) for name, value in of.items()} for of in (own, tensors)))
    if wrong:
        raise CheckpointError(f"{problem}: {'; '.join(wrong)}. Correct tokenizer.encoder or tokenizer.decoder.")
    module.load_state_dict(dict(tensors))
