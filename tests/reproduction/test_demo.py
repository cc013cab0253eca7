"""What a demo concludes: means, standard errors, and whether the paper's ordering holds."""

import math

import pytest

from megavar.config.table import TableConfig
from megavar.errors import ConfigError
from megavar.reproduction.demo import Mean, compare, demo_runs, paper_order, verdict


def table(**demo):
    rows = [{"name": name, "paper": {"fid": value}} for name, value in (("best", 2.0), ("middle", 3.0), ("worst", 4.0))]
    section = {
        "config": "configs/quickstart.yaml", "size": "small",
        "rows": {name: [f"optimizer.lr=1e-{number}"] for number, name in enumerate(("worst", "best", "middle"), 2)},
        "metrics": {"fd": {"heading": "FD", "key": "fd64", "better": "lower"}},
    } | demo
    return TableConfig.model_validate(
        {"name": "t", "source": "s", "title": "t", "protocol": "p", "rows": rows, "demo": section,
         "metrics": {"fid": {"heading": "FID", "better": "lower"}}}, strict=False
    )  # fmt: skip


def test_means_have_the_sample_standard_error():
    mean = Mean.of([1.0, 2.0, 6.0])
    assert mean.value == 3.0 and mean.seeds == 3
    assert mean.error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert math.isnan(Mean.of([1.0]).error)


def found(best, middle, worst, error=0.1):
    values = {"best": best, "middle": middle, "worst": worst, "control": 0.0}
    return {name: {"fd": Mean(value, error, 3)} for name, value in values.items()}


@pytest.mark.parametrize(("values", "words"), [
    ((1.0, 2.0, 3.0), "ordering holds; 3 of 3 pairs are in the paper's order, 3 of them clearly"),
    ((1.0, 2.0, 2.1), "ordering holds; 3 of 3 pairs are in the paper's order, 2 of them clearly"),
    ((1.0, 2.1, 2.0), "neither shown nor contradicted at this size; 2 of 3 pairs"),
    ((3.0, 2.0, 4.0), "does NOT hold at this size (middle is clearly better than best); 2 of 3"),
])  # fmt: skip
def test_verdicts(values, words):
    pairs = compare(table(), found(*values), "fd")
    assert [(pair.better, pair.worse) for pair in pairs] == [("best", "middle"), ("best", "worst"), ("middle", "worst")]
    assert pairs[0].error == pytest.approx(math.hypot(0.1, 0.1))
    assert words in verdict(pairs)


def test_one_seed_decides_nothing():
    pairs = compare(table(), {name: {"fd": Mean.of([value])} for name, value in (("best", 3.0), ("worst", 1.0))}, "fd")
    assert not pairs[0].clear and "neither shown nor contradicted" in verdict(pairs)


def test_an_ordering_of_its_own():
    own = table(expected=["worst", "best"])
    assert paper_order(own, ["best", "worst"]) == ["worst", "best"]
    assert paper_order(table(), ["worst", "best"]) == ["best", "worst"]


def test_runs_are_named_after_what_they_train(monkeypatch, tmp_path):
    """The same training in two tables is one directory; another seed, or another row, is another."""
    monkeypatch.chdir(__file__.rpartition("/tests/")[0])
    runs = demo_runs(table(), 2, (), tmp_path)
    order = [(row, seed) for seed in (0, 1) for row in ("worst", "best", "middle")]
    assert [(run.row, run.seed) for run in runs] == order
    places = [run.config.run.path for run in runs]
    assert len(set(places)) == 6 and all(place.startswith(str(tmp_path)) for place in places)
    other = table(rows={"x": ["optimizer.lr=1e-3"]})
    assert demo_runs(other, 1, (), tmp_path)[0].config.run.path == places[1]
    assert demo_runs(other, 1, ("sampling.number=32",), tmp_path)[0].config.run.path == places[1]


def test_rows_may_begin_with_the_first_one_of_their_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(__file__.rpartition("/tests/")[0])
    first, *others = demo_runs(table(begin_with="worst"), 2, (), tmp_path)
    bases = {0: first.config.run.path, 1: others[2].config.run.path}
    assert others[2].row == "worst" and bases[0] != bases[1]
    for run in (first, *others):
        initial = run.config.train.initial_weights
        assert (initial is None) if run.row == "worst" else (initial.path == bases[run.seed])
    assert first.config.run.path == demo_runs(table(), 1, (), tmp_path)[0].config.run.path, "the same run as without"
    fresh = {"worst": [], "best": ["optimizer.lr=1e-4"], "middle": ["train.initial_weights=null"]}
    first, earlier, scratch = demo_runs(table(begin_with="worst", begin_at=800, rows=fresh), 1, (), tmp_path)
    assert earlier.config.train.initial_weights.path == f"{first.config.run.path}/checkpoints/step-00000800"
    assert scratch.config.train.initial_weights is None, "what a row says goes first"
    with pytest.raises(ValueError, match="set begin_with"):
        table(begin_at=800)
    with pytest.raises(ValueError, match="not the first row"):
        table(begin_with="best")


def test_a_table_without_a_demo_says_so():
    without = table().model_copy(update={"demo": None})
    with pytest.raises(ConfigError, match="no section `demo`"):
        demo_runs(without, 1, ())
