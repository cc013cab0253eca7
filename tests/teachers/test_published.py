"""Files of timm and transformers, loaded into our network, give the features of their own classes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megavar.config.teachers.base import TeacherChoice
from megavar.config.teachers.vit import ViTTeacherChoice
from megavar.errors import CheckpointError
from megavar.teachers import published
from megavar.teachers.vit import VisionTransformer, normalized
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.weight_file import read_state_dict
from tests.teachers.make_golden import FOLDER, SHAPES

LAYOUTS = {
    "timm_dinov2": published.TimmLayout,
    "timm_dinov3": published.TimmDINOv3Layout,
    "timm_mocov3": published.TimmLayout,
    "transformers_dinov2": published.TransformersDINOv2Layout,
    "transformers_dinov3": published.TransformersDINOv3Layout,
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def layout_of(name: str, kind: type | None = None):
    family = "_".join(name.split("_")[:2])
    return (kind or LAYOUTS[family])(SimpleNamespace(shape=SHAPES[name]), None)


def network_of(name: str, state: dict[str, torch.Tensor], kind: type | None = None) -> VisionTransformer:
    network = VisionTransformer(SHAPES[name]).eval()
    fill(network, layout_of(name, kind).load(state, shapes_of(network)))
    return network


def state_of(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weights."): value for key, value in golden(name).items() if key.startswith("weights.")}


@torch.no_grad()
def features(network: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    return network(normalized(images, network.shape))[:, network.prefix :]


@pytest.mark.parametrize("name", SHAPES)
def test_features_are_those_of_their_own_classes(name: str) -> None:
    stored = golden(name)
    found = features(network_of(name, state_of(name)), stored["input"])
    assert stored["output"].std() > 0.3
    torch.testing.assert_close(found, stored["output"], rtol=0, atol=1e-5)


def test_the_authors_files(tmp_path: Path) -> None:
    """They name the same tensors otherwise; DINOv2's class token has its position although it has registers."""
    state = state_of("timm_mocov3")
    moco = {f"module.base_encoder.{key}": value for key, value in state.items()}
    moco |= {f"module.momentum_encoder.{key}": -value for key, value in state.items()}
    moco |= {"module.predictor.0.weight": torch.ones(3), "module.base_encoder.head.0.weight": torch.ones(3)}
    file = tmp_path / "vit-b-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": moco, "optimizer": {"state": {}}}, file)
    moco = read_state_dict(file, "it")
    stored = golden("timm_mocov3")
    found = features(network_of("timm_mocov3", moco, published.MoCoLayout), stored["input"])
    torch.testing.assert_close(found, stored["output"], rtol=0, atol=1e-5)

    name = "transformers_dinov2_registers_gated"
    ours = network_of(name, state_of(name))
    layout = layout_of(name, published.FacebookLayout)
    facebook = {public: part for key, value in ours.state_dict().items()
                for public, part in zip(layout.names(key), layout.split(key, value))}  # fmt: skip
    assert {"register_tokens", "blocks.0.mlp.w12.weight", "blocks.1.ls2.gamma"} <= facebook.keys()
    again = network_of(name, facebook | {"mask_token": torch.ones(1, WIDTH)}, published.FacebookLayout)
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


WIDTH = SHAPES["timm_dinov2"].width


def test_another_network_is_refused_by_name() -> None:
    state = state_of("timm_dinov2")
    with pytest.raises(CheckpointError, match=r"unknown to the model: blocks\.0\.ls1\.gamma.*size"):
        network_of("timm_mocov3", state)
    with pytest.raises(CheckpointError, match=r"missing from the file: reg_token.*pos_embed is 1x26x16 in the file"):
        network_of("timm_dinov2_registers", state)


def test_shapes_of_all_published_sizes() -> None:
    """Millions of parameters as their authors state them (model cards of DINOv2, DINOv3; ViT-S and ViT-B)."""
    stated = {
        ("dinov2", "small"): 22.1, ("dinov2", "base"): 86.6, ("dinov2", "large"): 304, ("dinov2", "giant"): 1136,
        ("dinov3", "small"): 21, ("dinov3", "small_plus"): 29, ("dinov3", "base"): 86, ("dinov3", "large"): 300,
        ("dinov3", "huge_plus"): 840, ("mocov3", "small"): 22, ("mocov3", "base"): 86, ("mocov3", "large"): 304,
    }  # fmt: skip
    for (name, size), millions in stated.items():
        choice = TeacherChoice.make(name=name, size=size, weights="unused")
        assert isinstance(choice, ViTTeacherChoice)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in VisionTransformer(choice.shape).parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.035), (name, size, count)
        assert choice.image_side == {"dinov2": 224}.get(name, 256)


def test_golden_files_are_all_there() -> None:
    assert {path.stem for path in Path(FOLDER).iterdir()} == SHAPES.keys()
