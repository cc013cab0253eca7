"""A device is measured, plans take the measurements in the place of assumptions and say so, and runs compare."""

import dataclasses
import json

import pytest

from megavar.__main__ import main
from megavar.config.loading import load_config
from megavar.errors import ConfigError, ExitCode
from megavar.planning.calibration import Calibration, ModelPace
from megavar.planning.hardware import GIB, accelerator
from megavar.planning.plan import plan

CONFIG = "configs/quickstart.yaml"
ALIKE = ("generator.width=32", "generator.heads=2", "generator.experts.backend=grouped")


def pace(config, **fields):
    known = {"run": "quickstart", "generator": config.generator.model_dump(mode="json"), "precision": "fp32",
             "images": [1, 4], "block_seconds": [0.01, 0.02], "ends_seconds": [0.0, 0.01],
             "flops_per_second": 2e9, "tokenizer_flops_per_second": 5e9}  # fmt: skip
    return ModelPace(**known | fields)


def calibration(*paces, device="A processor", **fields):
    known = {"device": device, "date": "2026-11-28", "torch": "2", "memory": 8 * GIB, "bf16": 1e11, "tf32": 4e10,
             "fp32": 2e10, "bandwidth": 1e10, "launch_seconds": 1e-5}  # fmt: skip
    return Calibration(models=list(paces), **known | fields)


def planned(config, *, gpus=1, **options):
    return plan(config, gpus, None, suggestions=0, **options)


def test_the_command_measures_writes_and_uses(tmp_path, capsys):
    path = tmp_path / "calibration.json"
    arguments = ["plan", CONFIG, *ALIKE, "--gpus", "1"]
    assert main([*arguments, "--calibrate", str(path)]) == ExitCode.FINISHED
    out, said = capsys.readouterr()
    measured = Calibration.load(path)
    assert f"measured on {measured.device}, {measured.date}" in out and f"wrote {path}" in said
    (found,) = measured.models
    assert found.describes(load_config(CONFIG, ALIKE).generator) and found.images == [1, 4]
    assert all(seconds > 0 for seconds in (*found.block_seconds, measured.launch_seconds, found.flops_per_second))
    assert {entry["groups"] for entry in measured.products} == {1, 8}
    assert measured.attention[0]["kernel"] == "prefix" and measured.attention[0]["length"] == 21
    assert measured.bf16 > 0 and measured.bandwidth > 1e8 and measured.ranks == 1
    assert main([*arguments, "--json", "--calibration", str(path)]) == ExitCode.FINISHED
    values = json.loads(capsys.readouterr().out)
    assert values["calibrated"] and not values["utilization_is_assumed"]
    assert values["utilization_while_computing"] == pytest.approx(found.flops_per_second / measured.fp32)


def test_times_follow_from_what_was_measured():
    config = load_config(CONFIG, ["train.micro_batch_size=64"])
    measured = calibration(pace(config))
    plain = planned(config, calibration=measured)
    flops = plain.workload.train_flops
    assert plain.prediction.time.compute == pytest.approx(64 * flops / 2e9)
    assert plain.prediction.time.encode == pytest.approx(64 * plain.workload.tokenizer.encode_flops / 5e9)
    assert plain.workload.machine.gpu.memory == 8 * GIB and "A processor" in plain.calibrated
    slow = planned(config, calibration=calibration(pace(config, block_seconds=[100.0, 100.0])))
    assert slow.prediction.time.compute == pytest.approx(4 * 100)  # four blocks, all of them waiting for launches
    assert planned(config, calibration=measured, mfu=0.5).prediction.time.compute == pytest.approx(
        64 * flops / (0.5 * 2e10)
    )


def test_a_known_device_keeps_its_data_sheet_but_for_what_was_measured():
    config = load_config(CONFIG, ["train.precision=bf16"])
    measured = calibration(pace(config, precision="bf16"), device="NVIDIA H200", bandwidth=4e12, all_reduce=[
        {"bytes": 1e6, "seconds": 1.0}, {"bytes": 1e9, "seconds": 0.01}], ranks=4)  # fmt: skip
    gpu = measured.accelerator
    sheet = accelerator("h200")
    assert dataclasses.replace(gpu, memory=0, bandwidth=0, link=0) == dataclasses.replace(
        sheet, memory=0, bandwidth=0, link=0
    )
    assert gpu.bandwidth == 4e12 and gpu.link == pytest.approx(1.5e11)
    two = planned(config, gpus=2, gpus_per_node=8, calibration=measured)
    held = two.workload.parameters.total
    assert two.prediction.time.data == pytest.approx(2 * 1 / 2 * held * 2 / 1.5e11, rel=1e-6)


def test_the_nearest_generator_serves_and_the_plan_says_so():
    config, other = load_config(CONFIG), load_config(CONFIG, ALIKE)
    both = calibration(pace(config, flops_per_second=3e9), pace(other))
    assert planned(config, calibration=both).workload.utilization == pytest.approx(3e9 / 2e10)
    near = planned(config, calibration=calibration(pace(other)))
    assert any("another generator" in note for note in near.notes)
    with pytest.raises(ConfigError, match="has no fp32 generator without experts"):
        planned(load_config(CONFIG, ["generator.experts=null"]), calibration=both)


def test_what_cannot_be_used_is_refused(tmp_path, capsys):
    (tmp_path / "broken.json").write_text('{"format": 1}')
    for name in ("broken.json", "missing.json"):
        arguments = ["plan", CONFIG, "--gpus", "1", "--calibration", str(tmp_path / name)]
        assert main(arguments) == ExitCode.CONFIGURATION
        assert "--calibrate" in capsys.readouterr().err
    config = load_config(CONFIG)
    with pytest.raises(ConfigError, match="contradicts the calibration"):
        plan(config, 1, "h200", suggestions=0, calibration=calibration(pace(config)))
    with pytest.raises(ConfigError, match="trains a tokenizer"):
        from megavar.planning.calibrate import calibrate

        calibrate(load_config("configs/quickstart/tokenizer.yaml"), None)


def test_a_run_writes_down_what_was_expected_of_it(tmp_path):
    from megavar.parallel.environment import environment
    from megavar.training.expectation import Expectation
    from megavar.watchers import _expected

    config = load_config(CONFIG, [f"logging.calibration={tmp_path / 'c.json'}"])
    calibration(pace(config)).save(tmp_path / "c.json")
    expected = _expected(config, environment())
    prediction = planned(config, calibration=calibration(pace(config))).prediction
    memory = prediction.memory.total - prediction.memory.reserved
    assert expected == Expectation(prediction.time.total, memory, "measured on A processor, 2026-11-28")
    assert _expected(load_config(CONFIG), environment()) is None  # nothing is known of this processor
