"""A band of three seeds, and what is refused to make one."""

import json
from pathlib import Path

import pytest

from megavar.errors import ExitCode
from megavar.records.curves import Curve
from tests.commands.test_status import write_run
from tools import reference_curve


def seeded(
    folder: Path, seed: int, losses: dict[int, float], batch: int = 10, done: bool = True, samples: int = 40
) -> Path:
    path = write_run(folder / f"seed{seed}-{batch}-{samples}", steps=3, done=done)
    train = f"{{steps: 20, epochs: null, global_batch_size: {batch}, seed: {seed}}}"
    data = f"{{source: {{name: image_folder, path: /elsewhere/{seed}}}}}"
    (path / "config.yaml").write_text(
        f"run: {{name: small}}\ntrain: {train}\ndata: {data}\nvalidation: {{samples: {samples}}}\n"
    )
    events = [{"time": 1.0, "step": step, "event": "validation", "loss": loss} for step, loss in losses.items()]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return path


def test_seeds_make_a_band(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [seeded(tmp_path, seed, {10: 3.0 + 0.1 * seed, 20: 2.0 + 0.1 * seed}) for seed in (0, 1, 2)]
    out = tmp_path / "small.json"
    assert reference_curve.main([*map(str, runs), "--out", str(out)]) == ExitCode.FINISHED
    curve = Curve.load(out)
    assert (curve.name, curve.seeds, curve.steps) == ("small", (0, 1, 2), (10, 20))
    assert curve.mean == pytest.approx((3.1, 2.1)) and curve.high[1] == pytest.approx(2.4)
    for wrong, word in (
        ([runs[0], runs[0]], "the seed 0"),
        ([runs[0], seeded(tmp_path, 5, {10: 1.0}, batch=20)], "more than their seed: train.global_batch_size."),
        ([runs[0], seeded(tmp_path, 7, {10: 1.0}, samples=80)], "validation.samples"),
        ([runs[0], seeded(tmp_path, 6, {10: 1.0}, done=False)], "not finished"),
        ([runs[0]], "two runs or more"),
    ):
        assert reference_curve.main([*map(str, wrong), "--out", str(out)]) == ExitCode.CONFIGURATION
        assert word in capsys.readouterr().err
