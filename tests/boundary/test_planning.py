"""The foreign family is planned and benchmarked like any other, with its router, procedure and two passes per step."""

import json

import pytest

from megavar.config.choice import resolve
from megavar.errors import ExitCode
from megavar.planning.measure import Request, measure
from megavar.planning.plan import plan
from megavar.planning.report import format_plan
from tests.boundary import runs
from tools import benchmark, benchmark_timing


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return runs.write_run(folder / "toy.yaml", runs.write_tokenizer(folder / "tokenizer.safetensors"))


def test_costs_are_those_of_the_real_model(single_process, run_file):
    config = runs.load(run_file, "generator.experts=null")
    choice, space = config.generator, config.tokenizer.space
    real = resolve(choice)(choice, space)
    sizes = {name: parameter.numel() for name, parameter in real.named_parameters()}
    products = sum(size for name, size in sizes.items() if "linear" in name or name.startswith("head."))
    pairs = space.length * (space.length + 1) // 2
    (cost,) = measure([Request(choice, space, precision="fp32")])
    assert cost.parameters(config.parallel, 0).total == sum(sizes.values())
    assert (cost.weights_per_token, cost.weights_per_image) == (products, 0)
    assert cost.forward_flops == 2 * space.length * products + 4 * pairs * choice.width * choice.depth
    assert cost.model_flops == 3 * cost.forward_flops


def test_plan(run_file):
    result = plan(runs.load(run_file), 4, "h200", suggestions=2)
    cost = result.workload.cost(result.prediction.layout.parallel)
    assert result.workload.train_flops == 2 * cost.model_flops  # two passes with a loss
    assert result.workload.parameters.activated < result.workload.parameters.total
    assert result.sample_flops is not None and result.sample_flops > cost.forward_flops * 0.9
    assert result.better and result.fits
    assert "not counted: heads and teachers of the term toy_brightness" in format_plan(result)


def test_benchmark(run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_timing, "SECONDS_PER_MEASUREMENT", 0.0)
    out = tmp_path / "figures.json"
    arguments = [str(run_file), "--batch", "2", "--repeats", "1", "--json", str(out)]
    assert benchmark.main(arguments) == ExitCode.FINISHED, capsys.readouterr().err
    rows = [row for row in json.loads(out.read_text())["figures"] if "skipped" not in row]
    measured = {(row["part"], row["alternative"]) for row in rows}
    assert {alternative for _, alternative in measured} >= {
        "dense", "causal", "megatron", "from images", "from cached tokens", "bare loop", "engine", "drawing"
    }  # fmt: skip
    step = next(row for row in rows if row["alternative"] == "from images")
    assert step["teraflops_per_second"] > 0
