import json
import random
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


@pytest.mark.parametrize(
    "asked, options, runs_as",
    [
        (stage(1), {}, 0),
        (stage(2), {}, 0),
        (stage(3), {}, 3),
        (stage(2) | {"flops_profiler": {"enabled": True}}, {}, 2),
        (stage(1, offload_optimizer={"device": "cpu"}), {}, 1),
        (stage(1), {"data_parallel_size": 2}, 1),
        (stage(1), {"precision": "bf16"}, 1),
        (stage(1), {"parallel": ParallelConfig(tensor=2)}, 1),
    ],
)
def test_one_process_copies_nothing_to_shard_it_with_nobody(asked, options, runs_as):
    plan = complete(asked, **({"data_parallel_size": 1} | options))
    assert plan.stage == plan.json["zero_optimization"]["stage"] == runs_as
    assert (plan.clip_norm, plan.notes) == (2.0, ())


@pytest.mark.parametrize("number", [2, 3])
def test_pipeline_stages_refuse_zero_2_and_3(number):
    with pytest.raises(ConfigError, match=f"ZeRO stage {number} does not work with parallel.pipeline=2"):
        complete(stage(number), parallel=ParallelConfig(pipeline=2))


def test_the_given_content_is_not_changed():
    content = stage(1)
    before = json.dumps(content)
    complete(content)
    assert json.dumps(content) == before


def zero(**options):
    return {"zero_optimization": {"stage": 3, **options}}


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"flops_profiler": {"enabld": True}}, "flops_profiler.enabld is not valid (did you mean 'enabled'?)"),
        ({"aio": {"blok_size": 1}}, "aio.blok_size is not valid (did you mean 'block_size'?)"),
        ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable is not valid"),
        ({"timers": {"throughputs": {}}}, "timers.throughputs is not valid"),
        ({"comms_logger": {"verbos": True}}, "comms_logger.verbos is not valid"),
        ({"comms_logger": {"enabled": "true"}}, "comms_logger.enabled is 'true', but must be true or false"),
        ({"aio": []}, "aio must be an object"),
        ({"wall_clock_breakdown": "false"}, "wall_clock_breakdown is 'false', but must be true or false"),
        ({"steps_per_print": True}, "steps_per_print is True, but must be a whole number"),
        ({"prescale_gradients": 1}, "prescale_gradients is 1, but must be true or false"),
        ({"communication_data_type": "float42"}, "communication_data_type is 'float42', but must be one of fp32"),
        ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor is '2', but must be a number"),
        (zero(contiguous_gradients="true"), "zero_optimization.contiguous_gradients is 'true', but must be true or"),
        (zero(reduce_bucket_size="5e8"), "zero_optimization.reduce_bucket_size is '5e8', but must be a whole number"),
        (zero(overlap_comm="false"), "zero_optimization.overlap_comm is 'false'"),
        (zero(offload_param={"device": "cpu", "pin_memory": "no"}), "offload_param.pin_memory is 'no'"),
        (zero(offload_optimizer={"device": "nvme", "nvme_path": "/no/such/folder"}), "'/no/such/folder', which is no"),
        (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.nvme_path is None, which is no folder"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio is not offered"),
        (zero(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload is not offered"),
        (zero(stage3_module_granularity_threshold=5), "stage3_module_granularity_threshold is not offered"),
        (zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow is not offered"),
        (zero(stage3_param_persistance_threshold=0), "did you mean 'stage3_param_persistence_threshold'?"),
        (zero(offload_optimizer={"devise": "cpu"}), "zero_optimization.offload_optimizer.devise is not valid"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is not valid"),
        ({"flops_profiler": {"enabled": True}}, "works with ZeRO stages 2 and 3 only"),
        ({"zero_optimization": {"stage": 1}, "flops_profiler": {"enabled": True}}, "works with ZeRO stages 2 and 3"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype is 'fp8'"),
        ({"compile": {"backend": "inductor"}}, "unknown key 'compile': remove it, this trainer does not offer it"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "remove 'optimizer'"),
        ({"activation_checkpointing": {"partition_activations": True}}, "remove 'activation_checkpointing'"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_pass_over_or_die_of_is_refused(content, expected):
    with pytest.raises(ConfigError) as caught:
        validate_deepspeed(content, "zero.json")
    message = str(caught.value)
    assert message.startswith("zero.json: ") and expected in message and "\n" not in message, message
    assert "ignore" not in message, "of many keys that is not true"


def test_all_problems_of_a_file_are_said_at_once():
    content = {"zero_optimization": {"stage": "auto", "overlap_comm": "x", "zenflow": {}}, "aio": {"a": 1}, "typo": 1}
    with pytest.raises(ConfigError) as caught:
        validate_deepspeed(content, "zero.json")
    for part in ("stage is 'auto'", "overlap_comm is 'x'", "zenflow", "aio.a", "'typo'"):
        assert part in str(caught.value)


def test_deepspeeds_own_dialect_is_read(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text("""\ufeff{
      // hjson, as deepspeed itself reads it
      # and so
      "_comment": "keys that begin with _ are comments", /* and this */
      "zero_optimization": {"stage": 1, "_why": {"a": 1}, "reduce_bucket_size": 5e8,},
      "fp16": {"enabled": false, "loss_scale": 0},
      "amp": {"enabled": "auto"},
      "tensorboard": {"enabled": false, "output_path": "x"},
      "activation_checkpointing": {"partition_activations": false, "number_checkpoints": null},
      "data_types": null,
    }""")
    assert load_deepspeed_json(path) == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500_000_000}}


def test_what_hugging_face_leaves_to_the_trainer_is_left_to_it(tmp_path):
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000}, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "steps_per_print": "auto", "communication_data_type": "auto",
    }  # fmt: skip
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    assert load_deepspeed_json(path) == {"bf16": {}, "zero_optimization": {"stage": 3}}
    assert "auto" not in json.dumps(complete(load_deepspeed_json(path)).json)


@pytest.mark.parametrize(
    "text, key",
    [
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}', "'zero_optimization' twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' twice"),
    ],
)
def test_keys_appear_once(tmp_path, text, key):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(ConfigError, match=f"zero.json has {key}"):
        load_deepspeed_json(tmp_path / "zero.json")


def mutations(content, chance):
    """(path of keys, mutated content): misspelled, other types, out of range, nested, not finite."""
    def walk(section, path=()):
        for key, value in section.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from walk(value, (*path, key))

    for path in walk(content):
        for kind in ("misspelled", "text", "truth", "object", "list", "negative", "nan", "huge"):
            mutated = json.loads(json.dumps(content))
            section = mutated
            for key in path[:-1]:
                section = section[key]
            old = section[path[-1]]
            if kind == "misspelled":
                place = chance.randrange(len(path[-1]))
                key = path[-1][:place] + chance.choice("xyzq") + path[-1][place + 1 :]
                section[key] = section.pop(path[-1])
            else:
                section[path[-1]] = {
                    "text": str(old), "truth": not old, "object": {"value": old}, "list": [old], "negative": -7,
                    "nan": float("nan"), "huge": 10**30,
                }[kind]  # fmt: skip
            if mutated != content:
                yield path, kind, mutated


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_every_mutation_is_refused_or_changes_what_deepspeed_is_given(path, tmp_path):
    """With a fixed seed: nothing is passed over."""
    content = json.loads(path.read_text())
    before = complete(load_deepspeed_json(path)).json
    refused = changed = 0
    for keys, kind, mutated in mutations(content, random.Random(path.stem)):
        (tmp_path / "mutated.json").write_text(json.dumps(mutated))
        try:
            after = complete(load_deepspeed_json(tmp_path / "mutated.json")).json
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message and ("mutated.json" in message or "zero.json" in message), (kind, message)
            assert any(key[:4] in message for key in keys), (kind, keys, message)
            refused += 1
            continue
        assert after != before or kind == "truth", (kind, keys)  # a CPU turns overlap_comm off, whatever it says
        changed += 1
    assert refused > changed
