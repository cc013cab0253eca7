"""Tiny InternVL3 and Qwen2.5-VL folders answer as planted, on any number of ranks."""

import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra is not installed")

from megavar.config.base import Section
from megavar.config.loading import decode
from megavar.config.understanding import UnderstandingConfig
from megavar.errors import CheckpointError, ConfigError
from megavar.evaluation.understanding.answering import Answers
from megavar.evaluation.understanding.model import VisionLanguageModel
from megavar.evaluation.understanding.questions import Question
from megavar.parallel.environment import Environment, environment
from megavar.retention import read_benchmarks
from tests.distributed.harness import run_ranks
from tests.evaluation.understanding import files, folders

CPU, ONE = torch.device("cpu"), Environment(0, 1, 0, "single")
PLANTED = {"\n": {"Yes": 6.0, "A": 4.0, "No": 2.0}, "Yes": {"<|im_end|>": 9.0}}
"""Every answer is Yes; of letters A is the likeliest."""


class Holder(Section):
    understanding: UnderstandingConfig


def settings(root, model="", **keys):
    root.mkdir(exist_ok=True)
    tree = {"model": str(model), "benchmarks": files.all_of(root), "precision": "fp32", "chunk_size": 5, **keys}
    return decode({"understanding": tree}, Holder, "here").understanding


@pytest.mark.parametrize(("kind", "how"), [("internvl", "generated"), ("qwen2_5_vl", "likelihood")])
def test_planted_answers_give_planted_scores(kind, how, tmp_path):
    """Always yes is right once for every image of MME. The likeliest letter, A, is wrong in some rotation of all."""
    planted = folders.write(tmp_path / "model", kind, PLANTED)
    model = VisionLanguageModel(planted, CPU, "fp32")
    expected = {"mme_p": 500, "mmbench": 0, "mmbench/first": 0, "ai2d": 0, "textvqa": 50}
    if how == "likelihood":
        expected |= {"mmbench/first": 200 / 3, "ai2d": 50}
    given, found = settings(tmp_path / "files", planted, answers=how), {}
    for benchmark in read_benchmarks(given):
        answers = Answers(benchmark, given, {"folder": "x"}, tmp_path)
        answers.ask(lambda: model, ONE)
        found |= answers.score()
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert model.write(Question("?", lambda: files.picture(1)), longest=1) == "Yes"
    if kind == "internvl":
        tiled = VisionLanguageModel(planted, CPU, "fp32", tiles=3)._inputs(Question("?", lambda: files.picture(1)))
        assert len(tiled["pixel_values"]) == 3  # two tiles of an image that is wider than high, and all of it
    else:
        with pytest.raises(ConfigError, match="does not cut images into tiles"):
            VisionLanguageModel(planted, CPU, "fp32", tiles=3)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_likelihoods_are_transformers_own_and_see_the_image(kind, tmp_path):
    """Against one pass per option without padding."""
    model = VisionLanguageModel(folders.write(tmp_path / "model", kind), CPU, "fp32")
    asked = Question("Is it?", lambda: files.picture(1), ("Yes", "neither of them", "No"))
    found = model.likelihoods(asked)
    before = model._inputs(asked)["input_ids"][0]
    for option, value in zip(asked.options, found):
        inputs = model._inputs(asked, [option])
        ids = inputs["input_ids"][0]
        assert torch.equal(ids[: len(before)], before) and len(ids) > len(before)
        logits = model.model(**inputs).logits[0].log_softmax(-1)
        expected = sum(logits[place - 1, ids[place]] for place in range(len(before), len(ids)))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    other = model.likelihoods(Question("Is it?", lambda: files.picture(2), asked.options))
    assert (found - other).abs().max() > 1e-3
    assert model.choose(asked) == asked.options[int(found.argmax())]


class Counting:
    """Answers by the text; knows how often it was asked."""

    def __init__(self):
        self.asked = 0

    def write(self, question, longest):
        self.asked += 1
        return ("Yes", "No", "A", "stop")[len(question.text) % 4]

    def choose(self, question):
        self.asked += 1
        return question.options[len(question.text) % len(question.options)]


def ask(given, directory):
    counting, scores = Counting(), {}
    for benchmark in read_benchmarks(given):
        answers = Answers(benchmark, given, {"folder": "x"}, directory)
        answers.ask(lambda: counting, environment())
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        scores |= answers.score()
    return counting.asked, scores


def test_answers_do_not_depend_on_ranks_nor_on_interruptions(tmp_path):
    given = settings(tmp_path / "files")
    ((asked, alone),) = run_ranks(1, ask, given.model_copy(update={"chunk_size": 7}), tmp_path / "alone")
    both = run_ranks(2, ask, given, tmp_path / "both")
    assert asked == 24 + 7 + 4 + 2 == sum(count for count, _ in both) and min(count for count, _ in both) > 10
    assert all(scores == alone for _, scores in both)
    next(iter(tmp_path.glob("both/mme-*/chunk_000002.npz"))).unlink()
    assert sum(count for count, _ in run_ranks(2, ask, given, tmp_path / "both")) == 5


def test_what_transformers_cannot_load_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    with pytest.raises(CheckpointError, match="whose name ends in -hf"):
        VisionLanguageModel(tmp_path, CPU)
    with pytest.raises(
        CheckpointError, match=r"no folder of a vision-language model.*evaluation\.understanding\.model"
    ):
        VisionLanguageModel(tmp_path / "absent", CPU)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(CheckpointError, match="that transformers can load"):
        VisionLanguageModel(tmp_path, CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError, match=r"package transformers, which is not installed: pip install 'megavar\[vlm\]'"
    ):
        VisionLanguageModel(tmp_path, CPU)
