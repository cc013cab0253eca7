"""GenEval and DPG-Bench: prompts in the order of the official files, images where the official scorers look."""

import json

import pytest
import torch

from megavar.config.suites.dpg import DPGSuite
from megavar.config.suites.geneval import GenEvalSuite
from megavar.errors import DataError
from megavar.evaluation.suites.dpg import DPG
from megavar.evaluation.suites.geneval import GenEval
from tests.evaluation.suites.conftest import PHOTOGRAPHS, SHAPES, real_images


@pytest.fixture
def suites(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("b", "a", "c"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"text {name}")
    lines = [{"tag": "colors", "include": [], "prompt": name} for name in "fedcba"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    geneval = GenEval(GenEvalSuite(prompts=str(tmp_path / "metadata.jsonl"), per_prompt=2), SHAPES)
    return geneval, DPG(DPGSuite(prompts=str(tmp_path / "prompts")), SHAPES)


def test_prompts_are_asked_in_the_official_order(suites):
    geneval, dpg = (suite.conditions() for suite in suites)
    assert geneval.count == dpg.count == 12
    assert geneval.at(torch.tensor([0, 1, 2, 11])).captions == ("f", "f", "e", "a")
    assert dpg.at(torch.tensor([0, 3, 4, 11])).captions == ("text a", "text a", "text b", "text c")
    assert geneval.identity["origin"] == "geneval" != dpg.identity["origin"]


def test_folders_are_emitted_and_verified(tmp_path, suites, as_chunks):
    images = as_chunks(real_images(PHOTOGRAPHS)[0][:12])
    for suite in suites:
        suite.check()
        scores = suite.score(images, torch.device("cpu"), tmp_path)
        assert scores.metrics == {} and any("nothing amiss" in note for note in scores.notes)
        assert not suite.untrained_beside
    assert len(list((tmp_path / "geneval").glob("*/samples/*.png"))) == 12 and (tmp_path / "dpg" / "b.png").exists()


def test_missing_prompts_are_found_before_sampling(tmp_path):
    with pytest.raises(DataError, match=r"no \.txt files"):
        DPG(DPGSuite(prompts=str(tmp_path)), SHAPES).check()
    with pytest.raises(DataError, match="cannot be read as GenEval prompts"):
        GenEval(GenEvalSuite(prompts=str(tmp_path / "absent")), SHAPES).check()
