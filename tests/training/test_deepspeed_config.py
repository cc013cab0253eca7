import json
from pathlib import Path

import pytest

from megavar.config.deepspeed import complete_deepspeed, load_deepspeed_json, validate_deepspeed
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError

DIRECTORY = Path(__file__).parents[2] / "configs" / "deepspeed"


def complete(content, **changes):
    options = {
        "where": "zero.json", "parallel": ParallelConfig(), "data_parallel_size": 2, "global_batch_size": 16,
        "micro_batch_size": 4, "precision": "fp32", "gradient_clipping": 2.0,
    }  # fmt: skip
    return complete_deepspeed(content, **(options | changes))


def stage(number, **options):
    return {"zero_optimization": {"stage": number, **options}}


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_of_the_repository_are_valid_and_say_what_their_names_say(path):
    content = load_deepspeed_json(path)
    plan = complete(content)
    assert plan.stage == int(path.stem[4])
    assert ("offload_optimizer" in content["zero_optimization"]) == path.stem.endswith("offload")
    assert plan.json["gradient_clipping"] == (2.0 if plan.stage else 0.0)
    assert plan.json["managed_gradient_accumulation"] is False
    assert plan.json["gradient_accumulation_steps"] == 1
    assert plan.json["train_batch_size"] == 8 and plan.json["train_micro_batch_size_per_gpu"] == 4
    assert plan.json["bf16"]["enabled"] is False


def test_there_are_all_seven_files():
    names = {path.stem for path in DIRECTORY.glob("*.json")}
    assert names == {"zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"}


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"zero_optimizaton": {"stage": 1}}, "'zero_optimizaton' (did you mean 'zero_optimization'?)"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"reduce_bucket_sz": 5}}, "zero_optimization.reduce_bucket_sz"),
        ({"zero_optimization": {"reduce_bucket_sz": 5}}, "did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"stage": "five"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise"),
        ({"zero_optimization": 1}, "zero_optimization must be an object"),
        ({"fp16": {"enabled": True}}, "set `train.precision`"),
        ({"optimizer": {"type": "AdamW"}}, "the `optimizer` section of the YAML"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
    ],
)  # fmt: skip
def test_unknown_and_foreign_keys_are_refused(content, expected):
    with pytest.raises(ConfigError) as caught:
        validate_deepspeed(content, "zero.json")
    assert "zero.json" in str(caught.value) and expected in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"zero9.json does not exist.*zero0.json, zero1.json"):
        load_deepspeed_json(DIRECTORY / "zero9.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"zero_optimization": ')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_deepspeed_json(broken)
    broken.write_text("[1]")
    with pytest.raises(ConfigError, match="one JSON object"):
        load_deepspeed_json(broken)


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, but optimizer.gradient_clipping in the YAML is 2.0"),
        ({"train_batch_size": 32}, "train_batch_size=32, but train.global_batch_size in the YAML is 16"),
        ({"train_micro_batch_size_per_gpu": 8}, "train.micro_batch_size in the YAML is 4"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, but"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True, but train.precision in the YAML is 'fp32'"),
        (stage(0, offload_optimizer={"device": "cpu"}), "needs ZeRO stage 1"),
        (stage(2, offload_param={"device": "cpu"}), "needs ZeRO stage 3"),
        (stage(1, overlap_comm=True), "stages 2 and 3 only"),
    ],
)
def test_contradictions_name_both_places(content, expected):
    with pytest.raises(ConfigError) as caught:
        complete(content)
    assert "zero.json" in str(caught.value) and expected in str(caught.value)


def test_agreement_and_auto_are_no_contradiction():
    plan = complete({
        "gradient_clipping": 2.0, "train_batch_size": 16, "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}, **stage(2),
    })  # fmt: skip
    assert plan.stage == 2 and plan.notes == ()


@pytest.mark.parametrize(
    "parallel, options, runs_as",
    [
        ({}, {}, 0),
        ({"tensor": 2}, {}, 0),
        ({}, {"precision": "bf16"}, 1),
        ({"tensor": 2}, {"precision": "bf16"}, 1),
        ({"pipeline": 2}, {}, 1),
        ({"expert": 2}, {"has_experts": True}, 1),
        ({"tensor": 2}, {"has_experts": True}, 1),
        ({}, {"has_experts": True}, 0),
    ],
)
def test_stage_0_runs_as_1_where_it_would_clip_wrongly(parallel, options, runs_as):
    plan = complete(stage(0), parallel=ParallelConfig(**parallel), **options)
    assert plan.stage == plan.json["zero_optimization"]["stage"] == runs_as
    assert len(plan.notes) == runs_as
    if runs_as:
        assert "runs as stage 1" in plan.notes[0]
        assert plan.json["gradient_clipping"] == 2.0


@pytest.mark.parametrize("number", [2, 3])
def test_pipeline_stages_refuse_zero_2_and_3(number):
    with pytest.raises(ConfigError, match=f"ZeRO stage {number} does not work with parallel.pipeline=2"):
        complete(stage(number), parallel=ParallelConfig(pipeline=2))


def test_the_given_content_is_not_changed():
    content = stage(1)
    before = json.dumps(content)
    complete(content)
    assert json.dumps(content) == before
