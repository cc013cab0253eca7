"""The check of a GPU: sections lose nothing but themselves, what was found is kept, and a CPU runs them dry."""

import io
import json
import subprocess

import pytest
import torch

from megavar.errors import ExitCode
from tools import gpu_check, gpu_check_models, gpu_check_speed, gpu_check_tests, gpu_check_worker
from tools.gpu_check_report import markdown
from tools.gpu_check_sections import MODELS, SECTIONS, Section
from tools.gpu_check_worker import Check

WORK = "tests.tools.gpu_check_work"


def section(name, *arguments, seconds=60, beside=False):
    return Section(name, f"to {name}", f"{WORK}:{name}", seconds, arguments, beside)


def run(out, *sections, seconds=120.0):
    session = gpu_check.Session(out, sections, seconds=seconds, dry=True)
    return session.run(), json.loads((out / "gpu_check.json").read_text())


def test_a_section_that_crashes_or_hangs_loses_itself_only(tmp_path):
    code, result = run(tmp_path, section("crash"), section("hang", seconds=1), section("good", "d16"))
    assert code == ExitCode.FAILED
    found = result["sections"]
    assert [entry["status"] for entry in found.values()] == ["crashed", "out of time", "done"]
    assert found["crash"]["records"] == [{"check": "before the crash", "passed": True}]
    assert found["hang"]["records"] == [{"check": "before the hang", "passed": True}]
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["device"] == "cpu"
    assert "| it is good | yes |" in (tmp_path / "gpu_check.md").read_text()


def test_a_section_that_fails_says_why(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO("5\n"))
    assert gpu_check_worker.main([f"{WORK}:wrong", str(tmp_path / "records.jsonl"), "--dry"]) == 1
    assert records(Check(tmp_path / "records.jsonl", torch.device("cpu"), True, 0.0))[1] == {
        "error": "ValueError: no such | thing"
    }
    assert "gpu_check_work" in capfd.readouterr().err  # the traceback


def test_when_time_is_up_the_rest_is_not_run(tmp_path):
    code, result = run(tmp_path, section("hang"), section("good", "d16"), seconds=gpu_check.MARGIN_SECONDS + 9)
    assert code == ExitCode.FAILED
    assert [entry["status"] for entry in result["sections"].values()] == ["out of time", "not run"]


def test_every_section_has_its_function():
    import importlib

    assert {section.arguments[0] for section in SECTIONS if section.arguments} == {*MODELS, "eager", "compiled"}
    for entry in SECTIONS:
        module, _, function = entry.work.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture
def check(tmp_path, single_process):
    return Check(tmp_path / "records.jsonl", torch.device("cpu"), True, float("inf"))


def records(check):
    return [json.loads(line) for line in check.records_file.read_text().splitlines()]


def test_a_training_repeats_bit_by_bit_and_the_check_sees_where_it_does_not(check, monkeypatch):
    for mode in ("eager", "compiled"):
        gpu_check_tests.repetition(check, mode)
    assert [record["passed"] for record in records(check)] == [True] * 4
    steps = iter(range(1000))

    class Drifting(gpu_check_models.Training):
        def step(self, batch):
            super().step(batch)
            next(self.module.parameters()).data.add_(1e-3 * (next(steps) == 3))  # in the second run

    monkeypatch.setattr(gpu_check_tests, "Training", Drifting)
    gpu_check_tests.repetition(check, "eager")
    again = records(check)[4]
    assert not again["passed"] and again["different_tensors"]


def test_grouped_experts_are_compared_with_single_ones(check, monkeypatch):
    gpu_check_tests.grouped_experts(check)
    assert all(record["passed"] for record in records(check)) and len(records(check)) == 4
    whole = gpu_check_tests._fill
    monkeypatch.setattr(gpu_check_tests, "_fill", lambda layer: (whole(layer), _spoil(layer)))
    gpu_check_tests.grouped_experts(check)
    assert not records(check)[4]["passed"]


def _spoil(layer):
    first = next(value for name, value in layer.named_parameters() if "linear_fc1_weight" in name or "fc1" in name)
    first.data.view(-1)[: first.numel() // 8].mul_(-1 if first.dim() == 3 else 1)


def test_attention_kernels_are_compared_with_exact_results(check, monkeypatch):
    gpu_check_tests.flex_gradient(check)
    found = {record["check"]: record for record in records(check)}
    assert found["prefix at head size 64 is as exact as dense"]["passed"]
    assert "skipped" in found["flex at head size 64"]


def test_train_steps_are_measured(check):
    gpu_check_speed.train(check, "stmoe-d16")
    (eager, *_) = [record for record in records(check) if record.get("mode") == "eager"]
    assert eager["images"] == 4 and eager["images_per_second"] == pytest.approx(4 / eager["seconds"])
    assert 3.5 < eager["loss"] < 4.3  # log 64 is 4.16 at first; it learns the few batches that it sees


def test_tables_show_what_was_measured_and_nothing_else():
    step = {"subject": "d16", "what": "train step", "mode": "eager", "images": 2, "images_per_second": 100.0,
            "seconds": 0.02, "peak_bytes": 3 * 2**30, "first_seconds": 1.0}  # fmt: skip
    product = {"subject": "device", "what": "bf16 product of 8192", "flops_per_second": 800e12, "seconds": 1e-3}
    expected = {"subject": "d16", "what": "prediction", "flops_per_image": 4e12, "memory_bytes": [0, 6 * 2**30]}
    result = {"machine": None, "started": "now", "dry": False, "sections": {
        "all": {"title": "all", "status": "done", "seconds": 1.0, "records": [step, product, expected]}}}  # fmt: skip
    text = markdown(result)
    assert "| d16 | eager | 2 | 100.0 | 20.0 | 50.0% | 3.0 | 6.0 | +100% |" in text
    result["sections"]["all"]["records"] = [step]
    assert "| d16 | eager | 2 | 100.0 | 20.0 |  | 3.0 |  |  |" in markdown(result)
    assert "Calibration" not in text


def test_rendering_an_earlier_run(tmp_path, capsys):
    result = {"machine": {"gpu": "H"}, "started": "t", "dry": False, "sections": {}}
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert gpu_check.main(["--render", str(tmp_path / "r.json")]) == ExitCode.FINISHED
    assert capsys.readouterr().out.startswith("H, t, commit None")


def test_the_script_that_collects_wheels_is_one():
    assert subprocess.run(["bash", "-n", "tools/gpu_wheels.sh"]).returncode == 0
