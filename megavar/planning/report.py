"""A plan as text for people, and as plain values for programs."""

import dataclasses
from typing import Any

from megavar.parallel.topology import describe
from megavar.planning.hardware import EXPERTS_UTILIZATION, GIB
from megavar.planning.plan import Plan
from megavar.planning.workload import HEADROOM, GeneratorWorkload, Prediction
from megavar.wording import duration

_MEMORY_NOTES = {
    "optimizer": "fp32 master weights and two moments",
    "buckets": "gradient buckets; parameters that ZeRO-3 gathers",
    "logits": "head, logits, cross entropy (float32)",
    "working": "gradients and recomputed activations of one block, beyond the logits' room",
    "tokenizer": "frozen networks, images and features of a step",
    "encoding": "encoding a micro-batch, beyond the room that training leaves",
    "reserved": "CUDA context, NCCL, fragmentation (assumed)",
}


def format_plan(plan: Plan, price: float | None = None) -> str:
    """The plan as text.

    Args:
        price: of one GPU for an hour.
    """
    sections = (_head(plan), _model(plan), _memory(plan), _time(plan, price), _suggestions(plan))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    workload, gpu = plan.workload, plan.workload.machine.gpu
    source = "given" if plan.calibrated is None else plan.calibrated
    if plan.assumed_utilization:
        source = "an assumption, not a measurement; pass --mfu, or --calibration FILE"
    lines = [
        f"{plan.name} on {plan.gpus} x {gpu.name} ({gpu.memory / GIB:.0f} GiB, "
        f"{workload.peak / 1e12:.0f} TFLOP/s peak)",
        describe(plan.prediction.layout.parallel, plan.gpus).splitlines()[0],
        f"utilization while blocks compute: {workload.utilization:.0%} ({source})",
    ]
    if plan.assumed_utilization and workload.limits is not None and workload.limits.experts is not None:
        lines[-1] += f"; {EXPERTS_UTILIZATION:g} of a dense model's"
    return lines + [f"note: {note}" for note in plan.notes]


def _model(plan: Plan) -> list[str]:
    workload, count = plan.workload, plan.workload.parameters
    training = f"  training            {workload.train_flops / 1e12:10.3f} TFLOP per image, forward and backward"
    if not isinstance(workload, GeneratorWorkload):
        return ["MODEL", f"  parameters          {count.total / 1e6:10.1f} M", training]
    lines = [
        "MODEL",
        f"  parameters          {count.total / 1e6:10.1f} M   activated per token {count.activated / 1e6:.1f} M",
        f"  weights per token   {count.per_token / 1e6:10.1f} M   once per image {count.per_image / 1e6:.1f} M",
        training,
    ]
    if plan.sample_flops is not None:
        lines.append(f"  sampling            {plan.sample_flops / 1e12:10.3f} TFLOP per image, guidance included")
    for teacher in workload.teachers:
        share = teacher.encode_flops / workload.train_flops
        lines.append(
            f"  frozen teacher      {teacher.encode_flops / 1e12:10.3f} TFLOP per image ({share:.0%} more), "
            f"{teacher.parameters / 1e6:.0f} M parameters"
        )
    if workload.tokenizer is None:
        return [*lines, "  tokens are cached: nothing is encoded while training"]
    encode = workload.tokenizer.encode_flops
    share = encode / workload.train_flops
    return [*lines, f"  frozen tokenizer    {encode / 1e12:10.3f} TFLOP per image ({share:.0%} more)"]


def _memory(plan: Plan) -> list[str]:
    prediction, capacity = plan.prediction, plan.workload.machine.gpu.memory
    layout = prediction.layout
    lines = [f"MEMORY of a rank of pipeline stage {prediction.stage} (ZeRO-{layout.zero.stage}, micro-batch "
             f"{layout.micro_batch}, recompute {layout.parallel.recompute})"]  # fmt: skip
    for name, size in prediction.memory.parts().items():
        if size > 0:
            lines.append(f"  {name:<12}{size / GIB:9.2f} GiB   {_MEMORY_NOTES.get(name, '')}".rstrip())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'total':<12}{prediction.memory.total / GIB:9.2f} GiB   {verdict} in {HEADROOM:.0%} of "
                 f"{capacity / GIB:.0f} GiB")  # fmt: skip
    if prediction.host > 0:
        per_node = prediction.host * plan.workload.machine.gpus_per_node
        lines.append(f"  offloaded to the memory of each node: {per_node / GIB:.0f} GiB")
    return lines


def _time(plan: Plan, price: float | None = None) -> list[str]:
    prediction = plan.prediction
    layout, time = prediction.layout, prediction.time
    lines = [
        f"TIME of a step of {layout.global_batch} images ({layout.data} data-parallel ranks x {layout.micro_batches} "
        f"micro-batches of {layout.micro_batch})"
    ]
    for name, seconds in time.parts().items():
        if seconds > 0:
            lines.append(f"  {name:<12}{seconds * 1e3:9.1f} ms    {seconds / time.total:4.0%}")
    speed = f"{plan.images_per_second:.0f} images/s, {plan.images_per_second / plan.gpus:.0f} per GPU"
    lines.append(f"  {'total':<12}{time.total * 1e3:9.1f} ms    {speed}, MFU in the log {plan.utilization:.0%}")
    epochs = f" = {plan.steps * layout.global_batch / plan.images:.4g} epochs of {plan.images}" if plan.images else ""
    lines.append(f"  {plan.steps} steps{epochs}: {duration(plan.seconds)}, "
                 f"{plan.gpu_hours:.0f} GPU hours")  # fmt: skip
    if price is not None:
        spent = f"{plan.gpu_hours * price:9,.0f}"
        lines.append(f"  {'price':<12}{spent}       at {price:g} per GPU hour, without scores and interruptions")
    if plan.links is not None:
        jobs = "job" if plan.links == 1 else "jobs"
        lines.append(f"  {plan.links} {jobs} of {duration(plan.limit_seconds or 0)} usable time")
    return lines


def _suggestions(plan: Plan) -> list[str]:
    if not plan.better:
        return ["No layout of these GPUs fits the run, not even with ZeRO-3 and offloading: use more GPUs."]
    header = (
        f"  {'':>2} {'data':>5} {'tensor':>6} {'pipe':>4} {'expert':>6} {'ZeRO':>4} {'micro':>5} {'recompute':>9} "
        f"{'GiB':>6} {'s/step':>8} {'images/s':>8}"
    )
    lines = ["LAYOUTS THAT FIT, fastest first", header]
    lines += [_row(str(number), prediction) for number, prediction in enumerate(plan.better, 1)]
    if plan.prediction.layout not in [prediction.layout for prediction in plan.better]:
        lines.append(_row("as", plan.prediction) + ("" if plan.fits else "  does not fit"))
    best = plan.better[0]
    if best.layout != plan.prediction.layout:
        lines += ["", "To use the first, write:", *(f"  {line}" for line in yaml_lines(best))]
    return lines


def _row(label: str, prediction: Prediction) -> str:
    layout = prediction.layout
    parallel = layout.parallel
    offload = "+off" if layout.zero.offload_optimizer else ""
    return (
        f"  {label:>2} {layout.data:>5} {parallel.tensor:>6} {parallel.pipeline:>4} {parallel.expert:>6} "
        f"{f'{layout.zero.stage}{offload}':>4} {layout.micro_batch:>5} {parallel.recompute:>9} "
        f"{prediction.memory.total / GIB:>6.1f} {prediction.time.total:>8.3f} "
        f"{layout.global_batch / prediction.time.total:>8.0f}"
    )


def yaml_lines(prediction: Prediction) -> list[str]:
    """What to write in the configuration to get a layout."""
    layout = prediction.layout
    parallel, zero = layout.parallel, layout.zero
    offload = "_offload" if zero.offload_optimizer else ""
    sizes = [f"{name}: {getattr(parallel, name)}" for name in ("tensor", "pipeline", "expert")]
    extra = ["sequence: true"] if parallel.sequence else []
    return [
        f"parallel: {{{', '.join([*sizes, *extra, f'recompute: {parallel.recompute}'])}}}",
        f"deepspeed: configs/deepspeed/zero{zero.stage}{offload}.json",
        f"train: {{micro_batch_size: {layout.micro_batch}}}",
    ]


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values (bytes, seconds, operations)."""

    def values(prediction: Prediction) -> dict[str, Any]:
        layout = prediction.layout
        return {
            "parallel": layout.parallel.model_dump(),
            "zero": dataclasses.asdict(layout.zero),
            "data_parallel_size": layout.data,
            "micro_batch_size": layout.micro_batch,
            "micro_batches": layout.micro_batches,
            "pipeline_stage": prediction.stage,
            "host_bytes": prediction.host,
            "memory_bytes": prediction.memory.parts() | {"total": prediction.memory.total},
            "step_seconds": prediction.time.parts() | {"total": prediction.time.total},
            "fits": prediction.fits(plan.workload.machine.gpu.memory),
        }

    return {
        "name": plan.name,
        "gpus": plan.gpus,
        "gpu": plan.workload.machine.gpu.name,
        "utilization_while_computing": plan.workload.utilization,
        "utilization_is_assumed": plan.assumed_utilization,
        "calibrated": plan.calibrated,
        "parameters": dataclasses.asdict(plan.workload.parameters),
        "train_flops_per_image": plan.workload.train_flops,
        "sampling_flops_per_image": plan.sample_flops,
        "images_per_second": plan.images_per_second,
        "mfu": plan.utilization,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "jobs": plan.links,
        "configured": values(plan.prediction),
        "layouts": [values(prediction) for prediction in plan.better],
        "notes": list(plan.notes),
    }
