"""Run directories as training leaves them, written by hand."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BEGAN = 1_795_000_000.0


def write_run(
    path: Path, *, slope: float = 0.01, restart: bool = False, scores: dict[str, float] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A finished run of 100 steps whose loss is 4 - slope * step; restarted after step 50, or not."""
    (path / "samples").mkdir(parents=True)
    (path / "routing").mkdir()
    described: dict[str, Any] = {
        "run": {"name": path.name}, "train": {"steps": 100, "global_batch_size": 10, "seed": 0},
        "recipe": {"name": "mepa"}, "generator": {"name": "var", "experts": {"number": 2}},
        "logging": {"interval": 10}, "optimizer": {"lr": 0.001},
    }  # fmt: skip
    (path / "config.yaml").write_text(json.dumps(described | (config or {})))
    (path / "data.json").write_text(json.dumps({"source": "x", "samples": 50, "class_names": ["cat", "<dog>"]}))
    kept, lost = [], []
    for step in range(10, 101, 10):
        line = {
            "step": step, "loss": 4 - slope * step, "loss/scale_01": 3.0, "loss/scale_02": 4.0, "step_seconds": 1.0,
            "expert_share/0": 0.4, "expert_share/1": 0.6, "images_per_second": 10.0, "time": BEGAN + step,
        }  # fmt: skip
        if restart and step > 50:
            if step == 60:
                lost.append(line)
            line = line | {"time": BEGAN + 100 + step}
        kept.append(line)
    events: list[dict[str, Any]] = [
        {"event": "loss_spike"}, {"event": "expectation", "expected_step_seconds": 0.5, "source": "plan"},
        {"event": "alert", "kind": "disk", "message": "disk is <full>"},
        {"event": "validation", "loss": 3.5, "samples": 8},
    ]  # fmt: skip
    kept[2:2] = [{"step": 25, "time": BEGAN + 25} | event for event in events]
    kept.append({"step": 100, "time": kept[-1]["time"], "event": "validation", "loss": 2.5, "samples": 8})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    if lost:
        (path / "metrics.discarded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    starts = [BEGAN, BEGAN + 100] if restart else [BEGAN]
    stamps = [datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S%z") for at in starts]
    layout = {"layout": {"world_size": 4}, "device": "Some GPU", "commit": "c0ffee", "packages": {"torch": "2"}}
    (path / "attempts.jsonl").write_text("".join(json.dumps({"started_at": s} | layout) + "\n" for s in stamps))
    for step in (50, 100):
        Image.new("RGB", (400, 160), (step, 0, 0)).save(path / f"samples/step-{step:08d}.png")
    np.savez(path / "routing/step-00000100.npz", load=np.ones((2, 3, 2)), targets=np.array(["0", "1"]),
             kinds=np.array(["1x1", "2x2", "4x4"]))  # fmt: skip
    if scores is not None:
        table = [{"key": key, "better": "lower", "threshold": 5.0} for key in scores]
        result = {
            "suite": "digits", "metrics": scores, "count": 8, "baselines": {"noise_1": dict.fromkeys(scores, 50.0)},
            "table": table, "sampler": {"guidance": 1.5}, "checkpoint": {"checkpoint": "step-00000100"},
        }  # fmt: skip
        (path / "scores-digits-step-00000100-aa.json").write_text(json.dumps(result))
    (path / "DONE").write_text("{}")
    return path
