"""What ``tools/gpu_check.py`` does, most valuable first: a session on a borrowed GPU may end at any moment.

Free of torch: the process that starts and watches the sections must not wait for it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One part of the check, run in a process of its own."""

    name: str
    title: str
    work: str
    """``module:function``, called with a :class:`tools.gpu_check_worker.Check`."""
    seconds: int
    """Its time limit."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the function."""
    beside: bool = False
    """Whether it runs beside all others from the start, on the CPU alone."""


MODELS = {
    "d16": ("configs/mepa/var_d16.yaml", 16),
    "d20": ("configs/mepa/var_d16.yaml", 20),
    "d24": ("configs/mepa/var_d16.yaml", 24),
    "d30": ("configs/mepa/var_d16.yaml", 30),
    "stmoe-d16": ("configs/mepa/stmoe_d16.yaml", 16),
    "stmoe-d20": ("configs/mepa/stmoe_d16.yaml", 20),
}
"""Configuration file and depth of each model that is measured, at 256 x 256 pixels."""

SECTIONS = (
    Section("predictions", "What the planner expects", "tools.gpu_check_plan:predictions", 400, beside=True),
    Section("machine", "The device", "tools.gpu_check_speed:device", 40),
    Section("steps", "Losses of five steps, against this machine's CPU", "tools.gpu_check_tests:steps", 60, ("eager",)),
    Section("repetition", "Ten steps twice, bit by bit", "tools.gpu_check_tests:repetition", 60, ("eager",)),
    Section("flex", "FlexAttention's gradient at the models' size", "tools.gpu_check_tests:flex_gradient", 60),
    Section("train-d16", "Train step of VAR-d16", "tools.gpu_check_speed:train", 75, ("d16",)),
    Section("train-stmoe-d16", "Train step of STMoE-d16", "tools.gpu_check_speed:train", 75, ("stmoe-d16",)),
    Section("steps-compiled", "The same, compiled", "tools.gpu_check_tests:steps", 90, ("compiled",)),
    Section("experts", "Experts against a dense layer of equal FLOPs", "tools.gpu_check_speed:experts", 45),
    Section("grouped", "Grouped experts against one after the other", "tools.gpu_check_tests:grouped_experts", 40),
    Section("waiting", "Does a step wait for the device?", "tools.gpu_check_tests:waiting", 40),
    Section("sampling", "Sampling with VAR-d16 and STMoE-d16", "tools.gpu_check_speed:sampling", 60),
    Section("calibration", "`plan --calibrate`", "tools.gpu_check_plan:calibration", 110),
    Section("runs", "One NCCL rank under torchrun; resume, bit by bit", "tools.gpu_check_runs:runs", 120),
    Section("train-d30", "Train step of VAR-d30", "tools.gpu_check_speed:train", 75, ("d30",)),
    Section("repetition-compiled", "Ten steps twice, compiled", "tools.gpu_check_tests:repetition", 90, ("compiled",)),
    Section("train-d20", "Train step of VAR-d20", "tools.gpu_check_speed:train", 60, ("d20",)),
    Section("train-stmoe-d20", "Train step of STMoE-d20", "tools.gpu_check_speed:train", 75, ("stmoe-d20",)),
    Section("train-d24", "Train step of VAR-d24", "tools.gpu_check_speed:train", 60, ("d24",)),
    Section("attention", "Attention kernels", "tools.gpu_check_speed:attention", 45),
    Section("tokenizer", "Encoding and decoding images", "tools.gpu_check_speed:tokenizer", 40),
    Section("gradients", "The test suite's FlexAttention gradients", "tools.gpu_check_runs:gradient_tests", 90),
)
