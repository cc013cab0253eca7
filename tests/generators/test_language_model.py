"""Qwen2 on our blocks is transformers' Qwen2: logits, gradients, cache, positions, and folders byte for byte."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megavar.config.language_model import LanguageModelConfig
from megavar.errors import CheckpointError
from megavar.generators.language_model.published import Qwen2Layout
from megavar.training.checkpoint.weights import fill, shapes_of, tensors_of
from megavar.transformer.cache import KeyValueCache
from megavar.weight_folder import read_folder, write_folder
from tests.generators.language_models import SPACE, Text, TextConfig, Texts, foreign, ours, text_sizes
from tests.transformer.tiny import gradients

pytest.importorskip("transformers", reason="the vlm extra is not installed")
pytestmark = pytest.mark.usefixtures("single_process")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def text_model(model: nn.Module) -> nn.Module:
    return getattr(model.model, "language_model", model.model)


def head(model: nn.Module) -> torch.Tensor:
    return model.lm_head.weight


@pytest.fixture(scope="module", params=[("qwen2", True), ("internvl", False), ("qwen2_5_vl", True)], ids=lambda p: p[0])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' model and its folder: one file, or numbered ones."""
    kind, tied = request.param
    model, folder = foreign(kind, tied), tmp_path_factory.mktemp(kind) / "model"
    model.save_pretrained(folder, **({"max_shard_size": "120KB"} if kind == "internvl" else {}))
    return model, folder


def exported(model: nn.Module) -> dict[str, torch.Tensor]:
    return Qwen2Layout(model.choice, SPACE).export(tensors_of(model))


def test_logits_and_gradients_are_those_of_transformers(pair: tuple[nn.Module, Path]) -> None:
    theirs, model = pair[0], ours(pair[1])
    ids = torch.randint(0, 140, (2, 9), generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[1] * 9, [1] * 5 + [0] * 2 + [1] * 2]).bool()  # padding between text and what follows it
    positions = valid.long().cumsum(1) - 1
    expected = theirs(input_ids=ids, attention_mask=valid.long(), position_ids=positions).logits[valid]
    found = (model(Texts(ids, valid)).prediction @ head(theirs).t())[valid]
    torch.testing.assert_close(found, expected, **CLOSE)
    weights = torch.randn_like(expected)
    theirs.zero_grad()
    (expected * weights).sum().backward()
    (found * weights.detach()).sum().backward()
    layout = Qwen2Layout(model.choice, SPACE)
    parameters = dict(text_model(theirs).named_parameters())
    for name, gradient in gradients(model).items():
        if name == "text.weight" and head(theirs) is parameters["embed_tokens.weight"]:
            continue  # theirs also has what the tied head adds
        for part, value in zip(layout.names(name), layout.split(name, gradient)):
            scale = float(parameters[part].grad.abs().max())
            torch.testing.assert_close(value, parameters[part].grad, rtol=1e-5, atol=2e-6 * max(scale, 1), msg=part)


def test_the_cache_continues_grows_by_groups_and_forgets(pair: tuple[nn.Module, Path]) -> None:
    model = ours(pair[1]).eval()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 140, (2, 24), generator=generator)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, 3:5] = False
    positions = valid.long().cumsum(1) - 1
    whole = model(Texts(ids, valid)).prediction.detach()
    cache, past, parts = KeyValueCache(30), 0, []
    for size in (5, 1, 4, 14):
        span = slice(past, past + size)
        if past == 6:  # rows that are forgotten again
            extra = torch.cat([valid[:, :past], torch.ones(2, 3, dtype=torch.bool)], 1)
            model.step(Texts(ids[:, -3:], extra, torch.full((2, 3), 9)), cache)
            cache.crop(past)
        parts.append(model.step(Texts(ids[:, span], valid[:, : past + size], positions[:, span]), cache))
        past += size
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid], **CLOSE)


def test_a_folder_comes_back_byte_for_byte(pair: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model = ours(pair[1])
    write_folder(pair[1], tmp_path / "again", exported(model), model.sizes.depth)
    names = sorted(path.name for path in pair[1].iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    numbered = [name for name in names if name.endswith(".safetensors")]
    assert (len(numbered) > 2) == ("model.safetensors.index.json" in names)
    for name in names:
        assert (pair[1] / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_trained_weights_and_fewer_blocks_load_in_transformers(pair: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """The first two of three blocks are kept; bfloat16 stays bfloat16."""
    theirs, folder = pair[0], tmp_path / "half"
    type(theirs).from_pretrained(pair[1], dtype=torch.bfloat16).save_pretrained(folder)
    model = ours(folder, depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.03).bfloat16())
    write_folder(folder, tmp_path / "tuned", exported(model), 2)
    again = type(theirs).from_pretrained(tmp_path / "tuned")
    assert next(again.parameters()).dtype == torch.bfloat16 and len(text_model(again).layers) == 2
    ids = torch.arange(12).view(2, 6)
    expected = text_model(again.float())(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(Texts(ids)).prediction, expected, **CLOSE)
    untouched = [n for n in read_folder(folder) if not n.startswith(("model.", "language_model.model."))]
    for name in untouched:
        assert torch.equal(read_folder(folder)[name], read_folder(tmp_path / "tuned")[name]), name
    with pytest.raises(CheckpointError, match="exists"):
        write_folder(folder, tmp_path / "tuned", exported(model), 2)


def test_rows_and_columns_have_positions_of_their_own() -> None:
    import transformers as hf

    config = hf.Qwen2_5_VLConfig(text_config=text_sizes(rope={"mrope_section": [2, 2, 2]})).get_text_config()
    torch.manual_seed(3)
    theirs = hf.Qwen2_5_VLTextModel(config).eval()
    state = {f"model.{name}": value for name, value in theirs.state_dict().items()}
    model = ours(rotary_sections=(2, 2, 2))
    fill(model, Qwen2Layout(model.choice, SPACE).load(state, shapes_of(model)))
    ids, places = torch.arange(16).view(2, 8), torch.randint(0, 9, (3, 2, 8))
    expected = theirs(input_ids=ids, position_ids=places).last_hidden_state
    torch.testing.assert_close(model(Texts(ids, positions=places)).prediction, expected, **CLOSE)


def test_a_folder_of_another_model_is_refused(pair: tuple[nn.Module, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"other shapes: .*config\.json"):
        ours(pair[1], feed_forward=64)
    with pytest.raises(CheckpointError, match="keys missing"):
        ours(pair[1], depth=4)


COUNTS = [
    ({}, 357_898_112),
    ({"width": 1536, "depth": 28, "heads": 12, "feed_forward": 8960}, 1_310_340_608),
    ({"vocabulary": 151936, "width": 2048, "depth": 8, "heads": 16, "feed_forward": 11008}, 616_617_984),
    ({"vocabulary": 151936, "width": 2048, "depth": 21, "heads": 16, "feed_forward": 11008}, 1_618_618_880),
]
"""Blocks and last norm of InternVL3-1B and -2B and of Qwen2.5-VL-3B's first 8 and 21 blocks (77,076,992 each)."""


@pytest.mark.parametrize(("sizes", "expected"), COUNTS, ids=["internvl3_1b", "internvl3_2b", "qwen_8", "qwen_21"])
def test_published_models_have_the_published_numbers_of_parameters(sizes: dict[str, int], expected: int) -> None:
    choice = TextConfig(language_model=LanguageModelConfig(**sizes))
    with torch.device("meta"):
        model = Text(choice, SPACE)
    embedding = choice.language_model.vocabulary * choice.language_model.width
    assert sum(parameter.numel() for parameter in model.parameters()) - embedding == expected
