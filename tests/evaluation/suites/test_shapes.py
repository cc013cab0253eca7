import pytest
import torch

from megavar.config.data import DataConfig
from megavar.config.suites.shapes import ShapesSuite
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


@pytest.mark.parametrize("data", [DataConfig(), CLASS_SHAPES])
def test_data_without_captions_are_refused(data):
    with pytest.raises(ConfigError, match=r"evaluation\.suite\.name=classifier"):
        Shapes(ShapesSuite(), data).check()
