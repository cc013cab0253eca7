import pytest
import torch

from megavar.config.data import DataConfig
from megavar.config.shapes import ShapesSource
from megavar.config.suites.shapes import ShapesSuite
from megavar.data.build import build_source
from megavar.errors import ConfigError
from megavar.evaluation.shape_eval import true_scenes
from megavar.evaluation.suites.shapes import Shapes
from tests.evaluation.suites.conftest import CLASS_SHAPES, SHAPES


def test_prompts_are_asked_and_scored_in_index_order(tmp_path, as_chunks):
    suite = Shapes(ShapesSuite(per_tag=5, per_prompt=2), SHAPES)
    suite.check()
    asked = [prompt for prompt in suite.prompts() for _ in range(2)]
    conditions = suite.conditions()
    assert conditions.count == len(asked)
    assert conditions.at(torch.arange(len(asked))).captions == tuple(prompt.text for prompt in asked)
    scores = suite.score(as_chunks(true_scenes(asked, 32)), torch.device("cpu"), tmp_path)
    assert scores.metrics["strict"] == scores.metrics["lenient/position"] == 1
    assert len((tmp_path / "shape_eval.jsonl").read_text().splitlines()) == len(asked)
    rows = suite.baselines(0)
    assert rows["right scenes"]["strict"] == 1 and rows["other captions"]["strict"] < 0.3


def test_the_ceiling_is_what_a_tokenizer_keeps_of_right_scenes():
    suite = Shapes(ShapesSuite(per_tag=5), SHAPES)
    (kept,), (lost,) = (suite.ceiling(lambda images, by=by: images // by).values() for by in (1, 8))
    assert kept["strict"] == 1 and lost["strict"] < 0.5


def test_only_the_kinds_that_the_data_show_are_asked_for():
    source = ShapesSource(length=20, test_length=5, tags=("single_object", "colors"))
    data = SHAPES.model_copy(update={"source": source})
    assert {prompt.tag for prompt in Shapes(ShapesSuite(per_tag=5), data).prompts()} == {"single_object", "colors"}
    scenes, every = build_source(data), build_source(SHAPES)
    assert {scenes.prompt(index)[0].tag for index in range(20)} == {"single_object", "colors"}
    assert scenes.fingerprint != every.fingerprint


@pytest.mark.parametrize("data", [DataConfig(), CLASS_SHAPES])
def test_data_without_captions_are_refused(data):
    with pytest.raises(ConfigError, match=r"evaluation\.suite\.name=classifier"):
        Shapes(ShapesSuite(), data).check()
