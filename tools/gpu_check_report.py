"""The results of ``tools/gpu_check.py`` as Markdown; only what was measured, empty cells for what was not."""

from collections.abc import Iterable, Iterator
from typing import Any

GIB = 2**30
Record = dict[str, Any]


def markdown(result: Record) -> str:
    """All tables of a run."""
    parts = (_heading, _checks, _train, _drawing, _layers, _device, _calibration, _sections)
    return "\n\n".join(text for part in parts if (text := part(result))) + "\n"


def _records(result: Record) -> Iterator[Record]:
    for section in result["sections"].values():
        yield from section["records"]


def _of(result: Record, *whats: str) -> list[Record]:
    return [record for record in _records(result) if record.get("what") in whats]


def _table(title: str, columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [" | ".join(cells) for cells in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([f"### {title}", "", *head, *(f"| {line} |" for line in lines)])


def _cell(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _heading(result: Record) -> str:
    machine = result["machine"] or {}
    place = machine.get("gpu") or machine.get("processor") or "unknown device"
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "cuda", "nccl", "python", "megatron_core", "deepspeed") if machine.get(name)
    )  # fmt: skip
    kind = "dry run at tiny sizes; its figures mean nothing" if result["dry"] else "`python -m tools.gpu_check`"
    return f"{place}, {result['started']}, commit {machine.get('git')}; {versions} ({kind})"


def _checks(result: Record) -> str:
    rows = []
    for record in _records(result):
        if "check" in record:
            outcome = "skipped" if "skipped" in record else "yes" if record["passed"] else "**NO**"
            rows.append((record["check"], outcome, _detail(record)))
    return _table("What holds", ["check", "holds", ""], rows)


def _detail(record: Record) -> str:
    shown = {name: value for name, value in record.items() if name not in ("check", "passed")}
    words = []
    for name, value in shown.items():
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        if value not in ([], None) and len(text) < 160 and not isinstance(value, list | dict):
            words.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(words).replace("|", "/").replace("\n", " ")


def _predictions(result: Record) -> dict[str, Record]:
    return {record["subject"]: record for record in _of(result, "prediction")}


def _peak(result: Record) -> float | None:
    products = [r for r in _of_subject(result, "device") if r["what"].startswith("bf16 product")]
    return products[-1]["flops_per_second"] if products else None


def _of_subject(result: Record, subject: str) -> list[Record]:
    return [record for record in _records(result) if record.get("subject") == subject]


def _train(result: Record) -> str:
    expected, peak = _predictions(result), _peak(result)
    rows = []
    for record in _of(result, "train step"):
        model, mode = record["subject"], record["mode"]
        prediction = expected.get(model, {})
        images, flops = record["images"], prediction.get("flops_per_image")
        mfu = None if flops is None or peak is None else flops * record["images_per_second"] / peak
        memory = prediction.get("memory_bytes", [])
        planned = memory[images - 1] if images <= len(memory) else None
        measured = record["peak_bytes"]
        off = None if planned is None or measured is None else planned / measured - 1
        rows.append((
            model, mode, str(images), _cell(record["images_per_second"], "{:.1f}"),
            _cell(record["seconds"] * 1e3, "{:.1f}"), _cell(mfu, "{:.1%}"),
            _cell(measured and measured / GIB, "{:.1f}"), _cell(planned and planned / GIB, "{:.1f}"),
            _cell(off, "{:+.0%}"), f"first steps {record['first_seconds']:.1f} s",
        ))  # fmt: skip
    columns = ["model", "blocks", "micro-batch", "images/s", "ms/step", "MFU of the measured bf16 product", "peak GiB",
               "plan GiB", "plan over peak", ""]  # fmt: skip
    return _table("Train step, bf16, ZeRO-1, cached tokens", columns, rows)


def _drawing(result: Record) -> str:
    rows = [
        (
            record["subject"], record["what"], str(record["images"]), _cell(record["images_per_second"], "{:.2f}"),
            _cell(record["seconds"] * 1e3, "{:.1f}"), _cell((record["peak_bytes"] or 0) / GIB or None, "{:.1f}"),
        )
        for record in _of(result, "sampling", "sampling, CUDA graph", "encode", "decode")
    ]  # fmt: skip
    columns = ["model", "", "batch", "images/s", "ms", "peak GiB"]
    return _table("Sampling (guidance, decoder included), tokenizer", columns, rows)


def _layers(result: Record) -> str:
    rows = []
    for record in _records(result):
        if "alternative" not in record:
            continue
        if "skipped" in record:
            rows.append((record["what"], record["alternative"], "", "", "", f"skipped: {record['skipped']}"))
            continue
        against = "" if record["ratio"] is None else f"{record['ratio']:.3f} x {record['relative_to']}"
        flops = record["flops_per_second"]
        rows.append((record["what"], record["alternative"], str(record["images"]), _cell(record["seconds"] * 1e3),
                     _cell(flops and flops / 1e12), against))  # fmt: skip
    return _table("Layers", ["part", "alternative", "images", "ms", "TFLOP/s", "relative"], rows)


def _device(result: Record) -> str:
    rows = []
    for record in _of_subject(result, "device"):
        if "flops_per_second" in record:
            rows.append((record["what"], f"{record['flops_per_second'] / 1e12:.4g} TFLOP/s"))
        elif "bytes_per_second" in record:
            rows.append((record["what"], f"{record['bytes_per_second'] / 1e12:.3g} TB/s, read and written"))
        else:
            rows.append((record["what"], f"{record['seconds'] * 1e6:.3g} us"))
    return _table("Device", ["", "measured"], rows)


def _calibration(result: Record) -> str:
    rows = [
        (
            record["subject"], ", ".join(map(str, entry["images"])),
            ", ".join(f"{seconds * 1e3:.2f}" for seconds in entry["block_seconds"]),
            f"{entry['flops_per_second'] / record['bf16']:.1%}",
        )
        for record in _of(result, "calibration") for entry in record["models"]
    ]  # fmt: skip
    columns = ["model", "images", "ms per block, forward and backward", "share of the measured bf16 product"]
    return _table("Calibration", columns, rows)


def _sections(result: Record) -> str:
    rows = []
    for name, section in result["sections"].items():
        reason = section.get("reason", "").replace("|", "/").replace("\n", " ")
        rows.append((name, section["title"], section["status"], f"{section['seconds']:.0f}", reason))
    return _table("Sections", ["section", "", "status", "s", "reason"], rows)
