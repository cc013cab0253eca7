"""Plans: consistent numbers, suggestions that load and are allowed, errors that help."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import yaml

from megavar.__main__ import main
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError, ExitCode
from megavar.planning import flops_per_image, format_plan, peak_of_device
from megavar.planning.hardware import GIB, accelerator
from megavar.planning.layout import Zero
from megavar.planning.memory import chunks_in_flight
from megavar.planning.plan import configured_layout, plan
from megavar.planning.report import yaml_lines
from megavar.planning.search import complexity
from megavar.planning.timing import Machine
from megavar.planning.workload import HEADROOM

IMAGENET = 1_281_167
MEPA_D16 = """
run: {name: mepa-d16}
recipe: {name: mepa, tokenizer_weights: vae.pth}
tokenizer: {name: multiscale_vq}
generator: {name: var, depth: 16, experts: {number: 8, top_k: 3}}
data: {image_size: 256, source: {name: image_folder, path: /not/on/this/machine}, transform: {name: var}}
train: {epochs: 100, global_batch_size: 768, precision: bf16}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mepa-d16.yaml"
    path.write_text(MEPA_D16)
    return path


def make(config_file, *overrides, gpus=8, gpu="h200", suggestions=5, **options):
    config = load_config(config_file, overrides)
    return plan(config, gpus, gpu, images=IMAGENET, suggestions=suggestions, **options)


def predict(config_file, *overrides, **options):
    return make(config_file, *overrides, suggestions=0, **options).prediction


def test_numbers_belong_together(config_file):
    result = make(config_file, "train.micro_batch_size=24", mfu=0.25, job_seconds=24 * 3600)
    prediction = result.prediction
    assert prediction.layout.micro_batches == 4
    assert result.steps == round(100 * IMAGENET / 768)
    assert result.images_per_second == pytest.approx(768 / prediction.time.total)
    # Without other parts of the step the log would show the utilization that was stated.
    assert result.utilization * prediction.time.total / prediction.time.compute == pytest.approx(0.25)
    assert result.links == math.ceil(result.steps * prediction.time.total / (24 * 3600 - 900))
    assert result.fits
    assert flops_per_image(load_config(config_file)) == result.workload.train_flops


def test_overheads_appear_where_they_belong(config_file):
    dense = predict(config_file, "generator.experts=null", "train.micro_batch_size=12").time
    assert dense.tensor == dense.expert == dense.pipeline == dense.bubble == 0
    pipelined = predict(config_file, "parallel.pipeline=4", "train.micro_batch_size=24")
    assert pipelined.layout.micro_batches == 16
    assert pipelined.time.bubble == pytest.approx(pipelined.time.compute * 3 / 16)
    assert predict(config_file, "parallel.tensor=2", "train.micro_batch_size=24").time.tensor > 0
    alltoall = predict(config_file, "parallel.expert=8").time.expert
    allgather = predict(config_file, "parallel.expert=8", "parallel.dispatcher=allgather").time.expert
    assert 0 < alltoall < allgather
    full = predict(config_file, "parallel.recompute=full", mfu=0.3).time.compute
    none = predict(config_file, mfu=0.3).time.compute
    assert full / none == pytest.approx(4 / 3, abs=0.02)


def test_cached_tokens_need_no_encoding(config_file):
    cache = "data.source={name: cache, path: /not/here, images: {name: image_folder, path: /not/here}}"
    images, tokens = make(config_file), make(config_file, cache)
    assert images.prediction.time.encode > 0 and images.prediction.memory.tokenizer > 2**28
    assert tokens.prediction.time.encode == 0 and tokens.prediction.memory.tokenizer < 2**26
    assert "nothing is encoded" in format_plan(tokens)


def test_memory_follows_the_settings(config_file):
    def parts(*overrides):
        return predict(config_file, *overrides).memory

    base = parts("train.micro_batch_size=24")
    assert parts("train.micro_batch_size=12").activations == pytest.approx(base.activations / 2, rel=1e-4)
    assert parts("train.micro_batch_size=24", "parallel.recompute=full").activations < base.activations / 20
    third = parts("train.micro_batch_size=24", "deepspeed=configs/deepspeed/zero3.json")
    assert third.weights == pytest.approx(base.weights / 8)
    assert third.gradients == pytest.approx(base.gradients / 8)
    averaged = parts("train.micro_batch_size=24", "train.ema={decay: 0.999}")
    assert averaged.ema == pytest.approx(base.optimizer / 3)
    offloaded = predict(config_file, "deepspeed=configs/deepspeed/zero3_offload.json")
    assert offloaded.memory.optimizer == offloaded.memory.weights == 0
    assert offloaded.host == pytest.approx(third.optimizer + third.weights)
    assert "offloaded to the memory of each node" in format_plan(
        make(config_file, "deepspeed=configs/deepspeed/zero3_offload.json")
    )


@pytest.mark.parametrize(("overrides", "gpus", "gpu"), [
    ((), 8, "h200"), (("generator.depth=30", "train.global_batch_size=1024"), 64, "a100"),
    (("generator.depth=40", "generator.experts.number=64", "train.global_batch_size=512"), 64, "h200"),
    (("train.precision=fp32", "generator.experts=null"), 4, "l40s"),
])  # fmt: skip
def test_suggestions_fit_load_and_are_the_layout_that_was_meant(config_file, overrides, gpus, gpu):
    result = make(config_file, *overrides, gpus=gpus, gpu=gpu)
    assert 1 <= len(result.better) <= 5
    times = [prediction.time.total for prediction in result.better]
    assert all(later >= earlier * 0.98 for earlier, later in itertools.pairwise(times))
    for prediction in result.better:
        assert prediction.memory.total <= accelerator(gpu).memory * HEADROOM
        tree = yaml.safe_load("\n".join(yaml_lines(prediction)))
        pasted = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in tree.items()
                  if isinstance(value, dict) and key == "parallel"]  # fmt: skip
        pasted += [f"deepspeed={tree['deepspeed']}", f"train.micro_batch_size={tree['train']['micro_batch_size']}"]
        layout, _ = configured_layout(load_config(config_file, [*overrides, *pasted]), gpus)
        assert layout == prediction.layout


def test_a_simpler_layout_wins_among_equals(config_file):
    best = make(config_file, "generator.experts=null").better[0].layout
    assert (best.parallel.tensor, best.parallel.pipeline, best.zero.stage, best.parallel.recompute) == (1, 1, 1, "none")
    sharded = replace(best, parallel=best.parallel.model_copy(update={"tensor": 2}))
    assert complexity(best) < complexity(sharded)


def test_a_model_that_fits_nowhere_is_offloaded_or_refused(config_file):
    giant = ("generator.depth=64", "generator.experts.number=64", "train.global_batch_size=64")
    offloaded = make(config_file, "generator.depth=40", "generator.experts.number=64", gpus=8, gpu="a100")
    assert not offloaded.fits
    assert all(prediction.layout.zero.offload_optimizer for prediction in offloaded.better)
    hopeless = make(config_file, *giant, "generator.width=16384", gpus=1, gpu="rtx4090")
    assert hopeless.better == ()
    assert "use more GPUs" in format_plan(hopeless)


@pytest.mark.parametrize(("overrides", "gpus", "message"), [
    (("parallel.tensor=3",), 8, "does not divide the world size"),
    (("parallel.pipeline=2", "deepspeed=configs/deepspeed/zero2.json"), 8, "ZeRO stage 2 does not work"),
    (("train.global_batch_size=100",), 8, "cannot be split evenly"),
    (("parallel.expert=8", "generator.experts=null"), 8, "no experts"),
])  # fmt: skip
def test_what_the_trainer_would_refuse_is_refused(config_file, overrides, gpus, message):
    with pytest.raises(ConfigError, match=message):
        make(config_file, *overrides, gpus=gpus)


def test_unknown_gpus_and_lengths_are_errors_with_a_remedy(config_file):
    with pytest.raises(ConfigError, match="h200, h100"):
        make(config_file, gpu="h20000")
    with pytest.raises(ConfigError, match="--images"):
        plan(load_config(config_file, ["generator.classes=10"]), 8, "h200")
    imagenet = plan(load_config(config_file), 8, "h200", suggestions=0)
    assert imagenet.images == IMAGENET and "/not/on/this/machine is not here" in imagenet.notes[0]


def test_interleaved_rates_and_pipelines():
    parallel = ParallelConfig(pipeline=4)
    assert [chunks_in_flight(parallel, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(parallel, 0, 2) == 2
    interleaved = ParallelConfig(pipeline=4, virtual_pipeline=2)
    assert [chunks_in_flight(interleaved, rank, 16) for rank in range(4)] == [11, 9, 7, 5]
    machine = Machine(accelerator("h100"), 8)
    assert machine.rate(8, 1) > machine.rate(16, 1) > machine.rate(2, 8)


def test_zero_settings_are_read_from_deepspeed_json():
    assert Zero.of({}) == Zero(0)
    zero = {"stage": 3, "stage3_max_live_parameters": 7, "reduce_bucket_size": 9}
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}
    content = {"zero_optimization": zero | offload}
    assert Zero.of(content) == Zero(3, offload_parameters=True, bucket=9, live_parameters=7)
    assert Zero.of({"zero_optimization": {"stage": 2, "overlap_comm": True}}).buckets == 2


def test_peaks_are_found_by_device_name():
    assert peak_of_device("NVIDIA H200", "bf16") == 989e12
    assert peak_of_device("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_of_device("NVIDIA A100-SXM4-40GB", "bf16") == 312e12
    assert peak_of_device("Intel(R) Xeon(R)", "bf16") is None
    assert accelerator("A100-40GB").memory == 39 * GIB


def test_the_command_prints_text_and_values(config_file, capsys):
    arguments = ["plan", str(config_file), "generator.depth=20", "--gpus", "16", "--gpu", "h100", "--images", "1281167"]
    assert main([*arguments, "--hours", "12"]) == ExitCode.FINISHED
    text = capsys.readouterr().out
    for part in ("mepa-d16 on 16 x h100", "MEMORY", "TIME", "LAYOUTS THAT FIT", "an assumption", "jobs of"):
        assert part in text
    assert main([*arguments, "--json"]) == ExitCode.FINISHED
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"]["total"] == pytest.approx(2.44e9, rel=2e-3)
    memory = values["configured"]["memory_bytes"]
    assert memory["total"] == pytest.approx(sum(size for name, size in memory.items() if name != "total"))
    assert main([*arguments, "--mfu", "40"]) == ExitCode.CONFIGURATION
    assert "between 0 and 1" in capsys.readouterr().err


def test_a_tokenizer_in_training(capsys):
    arguments = ["plan", "configs/quickstart/tokenizer.yaml", "data.image_size=256", "tokenizer={name: multiscale_vq}",
                 "train.global_batch_size=64", "--gpus", "8", "--gpu", "h100"]  # fmt: skip
    assert main(arguments) == ExitCode.FINISHED
    text = capsys.readouterr().out
    assert "108.9 M" in text and "1.827 TFLOP" in text and "LAYOUTS THAT FIT" in text


def test_the_command_writes_a_layout_and_a_price_and_fails_strictly(config_file, tmp_path, capsys):
    told = ["plan", str(config_file), "--gpus", "8", "--gpu", "h200", "--strict", "--price", "2", "train.seed=3"]
    layout = tmp_path / "layout.yaml"
    assert main([*told, "--write", str(layout)]) == ExitCode.CONFIGURATION, "96 images need more than there is"
    said = capsys.readouterr()
    hours = int(re.search(r"(\d+) GPU hours", said.out)[1])
    price = float(re.search(r"price +([\d,]+)", said.out)[1].replace(",", ""))
    assert price == pytest.approx(2 * hours, abs=2) and "does not fit" in said.err
    assert load_config(layout).train.seed == 3
    assert main(["plan", str(layout), "--strict", "--gpus", "8"]) == ExitCode.FINISHED
    capsys.readouterr()
    assert main(["plan", str(config_file), "train.micro_batch_size=8"]) == ExitCode.FINISHED
    said = capsys.readouterr().out
    assert "on 1 x h200" in said and "this machine has no GPU" in said


def test_a_micro_batch_is_at_most_what_is_asked_for(config_file):
    config = load_config(config_file, ["train.micro_batch_size=48"])
    layouts = [configured_layout(config, gpus)[0] for gpus in (8, 32)]
    assert [(layout.micro_batch, layout.micro_batches) for layout in layouts] == [(48, 2), (24, 1)]
