"""Sections of ``tools/gpu_check.py`` about the planner: what it expects of the models."""

import dataclasses

from megavar.planning.calibrate import calibrate
from megavar.planning.layout import Layout
from megavar.planning.plan import configured_layout, plan
from tools.gpu_check_models import free, published
from tools.gpu_check_sections import MODELS
from tools.gpu_check_worker import Check

LARGEST = 400
"""Micro-batch up to which predictions are written down."""
IMAGENET = 1281167


def predictions(check: Check) -> None:
    """FLOPs of an image, and memory and step time on one H200 by micro-batch, of every model."""
    for model in MODELS:
        config = published(model, check.dry)
        planned = plan(config, 1, "h200", images=IMAGENET, suggestions=0)
        layout, _ = configured_layout(config, 1)
        largest = 8 if check.dry else LARGEST
        expected = [planned.workload.predict(_of_one_micro_batch(layout, images)) for images in range(1, largest + 1)]
        check.figure(
            model, "prediction",
            parameters=planned.workload.parameters.total, flops_per_image=planned.workload.train_flops,
            memory_bytes=[prediction.memory.total for prediction in expected],
            step_seconds=[prediction.time.total for prediction in expected],
        )  # fmt: skip


def _of_one_micro_batch(layout: Layout, images: int) -> Layout:
    return dataclasses.replace(layout, global_batch=images, micro_batch=images)


def calibration(check: Check) -> None:
    """What ``plan --calibrate`` writes, with VAR-d16 and with STMoE-d16."""
    check.mesh()
    for model in ("d16", "stmoe-d16"):
        found = calibrate(
            published(model, check.dry), check.device, lambda text: print(f"measuring: {text}", flush=True)
        )
        check.figure(model, "calibration", **found.to_json())
        free()
