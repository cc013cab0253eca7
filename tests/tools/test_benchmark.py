"""The benchmark measures every part on a CPU, writes its figures, and refuses what it cannot measure."""

import json

import pytest

from megavar.errors import ExitCode
from tools import benchmark, benchmark_timing
from tools.benchmark_cases import PARTS

TINY = ["generator.depth=2", "generator.width=16", "generator.heads=2", "tokenizer.base_channels=8"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "SECONDS_PER_MEASUREMENT", 0.0)


def test_all_parts(tmp_path, capsys):
    out, traces = tmp_path / "figures.json", tmp_path / "traces"
    arguments = ["configs/quickstart.yaml", *TINY, "--batch", "2", "--repeats", "3", "--json", str(out)]
    assert benchmark.main(arguments) == ExitCode.FINISHED
    written = json.loads(out.read_text())
    figures = {(row["part"], row["alternative"]): row for row in written["figures"]}
    names = {alternative for _, alternative in figures}
    assert {"dense", "prefix", "flex", "megatron", "grouped", "deepspeed", "tutel"} <= names
    assert {"from images", "from cached tokens", "bare loop", "engine", "engine, metrics", "drawing"} <= names
    assert {"drawing without guidance", "steps"} <= names  # the latter skipped: it is not drawn token by token
    for row in figures.values():
        if "skipped" not in row:
            seconds = row["seconds"]
            assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]
            assert len(seconds["samples"]) == 3 and seconds["peak_bytes"] is None
            assert row["images_per_second"] == pytest.approx(2 / seconds["median"])
    assert figures["trainer over a bare loop", "bare loop"]["ratio"]["median"] == 1.0
    assert written["machine"]["cores"] >= 1 and written["run"]["batch"] == 2
    text = capsys.readouterr().out
    assert "x bare loop" in text and "skipped: PyTorch has no CPU backward" in text
    assert not traces.exists()


def test_steps_of_decoding(tmp_path):
    """reAR Fig. 5: with guidance and without, early and late."""
    out = tmp_path / "figures.json"
    arguments = ["configs/demo/rar.yaml", "generator.depth=1", "generator.width=16", "sampling.guidance=4"]
    options = ["--batch", "2", "--repeats", "1", "--parts", "decoding", "--json", str(out)]
    assert benchmark.main([*arguments, *options]) == ExitCode.FINISHED
    rows = json.loads(out.read_text())["figures"]
    assert [row["alternative"] for row in rows] == ["step 4, guided", "step 60, guided", "step 4", "step 60"]
    assert {row["relative_to"] for row in rows} == {"step 4, guided"}


def test_ratios_are_taken_round_by_round():
    def timing(*samples):
        return benchmark_timing._summary(list(samples), 1, None)

    base, twice = timing(1.0, 5.0, 1.0), timing(2.0, 10.0, 2.0)  # the second round met a busy machine
    assert twice.ratio(base) == (2.0, 2.0, 2.0)


def test_alternatives_are_measured_in_turn():
    order = []
    timings = benchmark_timing.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order[-6:] == ["a", "b"] * 3
    assert len(timings["a"].samples) == 3


def test_traces_are_written(tmp_path, capfd):
    arguments = ["configs/quickstart.yaml", *TINY, "--batch", "1", "--repeats", "1", "--parts", "attention"]
    assert benchmark.main([*arguments, "--trace", str(tmp_path)]) == ExitCode.FINISHED
    events = json.loads((tmp_path / "attention-prefix.json").read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)


@pytest.mark.parametrize(("arguments", "message"), [
    (["configs/quickstart/tokenizer.yaml"], "no generator"),
    (["configs/quickstart.yaml", "--snapshot", "snapshots"], "there is no GPU here"),
    (["configs/nowhere.yaml"], "cannot be read"),
])  # fmt: skip
def test_errors_help(arguments, message, capsys):
    assert benchmark.main(arguments) == ExitCode.CONFIGURATION
    assert message in capsys.readouterr().err


def test_every_part_is_on_offer():
    assert set(PARTS) == {"attention", "experts", "train", "overhead", "sampling", "decoding"}
