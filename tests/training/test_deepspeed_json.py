"""One truth: the DeepSpeed dictionary follows the config, a user's JSON may only agree."""

from __future__ import annotations

import pytest

from mlip.ranks import distributed
from mlip.settings.config import ConfigError, load
from mlip.training.deepspeed_json import deepspeed_settings, read_json, refusal

CONFIG = load(
    [],
    [
        "batch.global_pairs=64",
        "train.zero_stage=2",
        "train.lr=0.001",
        "train.lr_reference_pairs=0",
        "train.precision=bf16",
    ],
)


def test_a_json_that_agrees_is_accepted_and_its_tuning_is_kept():
    user = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.05}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
    }
    settings = deepspeed_settings(CONFIG, user)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["zero_optimization"]["stage"] == 2
    # the optimiser and bf16 are the engine's own: nothing of them may reach DeepSpeed twice
    assert "optimizer" not in settings and "bf16" not in settings


def test_what_deepspeed_gets_is_the_config_and_nothing_beside_it(monkeypatch):
    # oracle: written by hand; what is not here would be DeepSpeed's own default
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    config = load([], ["batch.global_pairs=64", "train.clip_norm=0.5", "train.zero_stage=1"])
    expected = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
    }
    assert deepspeed_settings(config) == expected
    whole = load([], ["batch.global_pairs=64", "train.zero_stage=3", "train.offload=true"])
    assert deepspeed_settings(whole)["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu"},
    }


def test_a_json_may_repeat_every_setting_that_decides_a_key(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    params = {"lr": 0.001, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.2}
    settings = ["batch.global_pairs=64", "train.offload=true"]
    settings += ["train.lr_reference_pairs=16", "train.lr=0.0005"]  # times the root of 64 / 16
    settings += ["train.betas=[0.8,0.9]", "train.weight_decay=0.2", "train.zero_stage=1"]
    user = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 32,
        "bf16": {"enabled": False},
        "bfloat16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}},
    }
    made = deepspeed_settings(load([], settings), user)
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    for name, other in {
        "lr": 0.0005,
        "betas": [0.9, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.05,
    }.items():
        wrong = {"optimizer": {"params": {name: other}}}
        with pytest.raises(ConfigError, match=f"optimizer.params.{name} is"):
            deepspeed_settings(load([], settings), wrong)
    muon = load([], ["train.optimizer=muon", "train.zero_stage=0"])
    deepspeed_settings(muon, {"optimizer": {"type": "Muon"}})


def test_what_the_device_decides_has_no_second_setting():
    config = load([], ["train.precision=auto"])
    for enabled in (True, False):
        with pytest.raises(ConfigError, match="bf16.enabled is .*train.precision is 'auto'; leave"):
            deepspeed_settings(config, {"bf16": {"enabled": enabled}})
    assert deepspeed_settings(config, {"bf16": {"enabled": "auto"}}) == deepspeed_settings(config)


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ({"train_batch_size": 128}, ["train_batch_size", "128", "batch.global_pairs", "64"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "4", "negatives"]),
        ({"zero_optimization": {"stage": 3}}, ["stage", "3", "train.zero_stage", "2"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled", "False", "train.precision", "True"]),
        ({"bfloat16": {"enabled": False}}, ["bfloat16.enabled", "False", "True"]),
        ({"optimizer": {"type": "Muon"}}, ["optimizer.type", "Muon", "train.optimizer", "AdamW"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["device", "'none'"]),
        ({"zero_optimization": {"stage2_thing": 1}}, ["stage2_thing=1 has no place"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "train.precision"]),
        ({"optimizer": {"params": {"lr": 0.01}}}, ["optimizer.params.lr", "0.01", "0.001"]),
        ({"gradient_clipping": 5.0}, ["gradient_clipping", "5.0", "train.clip_norm", "1.0"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler.type", "WarmupLR"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning.enabled"]),
        ({"steps_per_print": {"every": 5}}, ["steps_per_print.every=5 has no place"]),
        ({"steps_per_print": 0}, ["steps_per_print is 0", "leave the key out"]),
        ({"dump_state_too": True}, ["dump_state_too=True has no place"]),
        ({"steps_per_print": True}, ["steps_per_print is True; expected a whole number"]),
        ({"wall_clock_breakdown": "x"}, ["wall_clock_breakdown is 'x'; expected true or false"]),
        ({"flops_profiler": {"profile_step": "x"}}, ["profile_step is 'x'; expected a whole"]),
        ({"flops_profiler": {"recompute_fwd_factor": "x"}}, ["factor is 'x'; expected a number"]),
        ({"flops_profiler": {"output_file": 5}}, ["output_file is 5; expected text"]),
        ({"flops_profiler": {"profil_step": 5}}, ["profil_step=5 has no place"]),
    ],
)
def test_a_json_that_contradicts_is_refused_with_both_values(user, named):
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(CONFIG, user)
    assert all(part in str(caught.value) for part in named), caught.value


def test_a_monitor_of_deepspeed_is_left_to_our_own_trackers_or_refused():
    """DeepSpeed would count samples for steps, know nothing of val, and send unasked."""
    monitors = ("tensorboard", "wandb", "csv_monitor", "comet")
    off = {name: {"enabled": False, "output_path": "x"} for name in monitors}
    ours = deepspeed_settings(CONFIG)
    assert deepspeed_settings(CONFIG, off) == deepspeed_settings(CONFIG, {"comet": {}}) == ours
    for name, hint in (
        ("tensorboard", "train.tensorboard is False; set train.tensorboard=true"),
        ("wandb", "train.wandb is False; set train.wandb=true"),
        ("csv_monitor", "log.jsonl has every step"),
        ("comet", "train.tensorboard, train.wandb and train.mlflow are the trackers"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.enabled is True.*{hint}"):
            deepspeed_settings(CONFIG, {name: {"enabled": True}})
    for name, key, hint in (
        ("wandb", "project", "WANDB_PROJECT"),
        ("wandb", "team", "WANDB_ENTITY"),
        ("tensorboard", "job_name", "run.dir/tensorboard"),
    ):
        config = load([], [f"train.{name}=true"])
        on = {name: {"enabled": True}}
        assert deepspeed_settings(config, on) == deepspeed_settings(config)
        with pytest.raises(ConfigError, match=f"{name}.{key}='a' is not read.*{hint}"):
            deepspeed_settings(config, {name: {"enabled": True, key: "a"}})
    with pytest.raises(ConfigError, match="wandb is True; expected an object"):
        deepspeed_settings(CONFIG, {"wandb": True})


def test_an_unreadable_json_is_an_error_that_names_the_file(tmp_path):
    assert read_json(None) is None
    path = tmp_path / "ds.json"
    with pytest.raises(ConfigError, match="ds.json"):
        read_json(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="ds.json"):
        read_json(str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected an object, got a list$"):
        read_json(str(path))


def test_what_deepspeed_itself_refuses_is_told_by_the_keys_of_the_json():
    """Its library's words, an address of theirs and a class stood where the file's keys belong."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    pydantic = pytest.importorskip("pydantic")
    user = {"zero_optimization": {"overlap_comm": "x", "reduce_bucket_size": -5, "stage3_a": 1}}
    settings = deepspeed_settings(CONFIG, user)
    with pytest.raises(pydantic.ValidationError) as caught:
        zero.DeepSpeedZeroConfig(**settings["zero_optimization"])
    told = str(refusal(caught.value, settings))
    assert told.startswith("DeepSpeed JSON: zero_optimization.")
    for part in (
        "zero_optimization.overlap_comm is 'x': Input should be a valid boolean",
        "zero_optimization.reduce_bucket_size is -5: Input should be greater than 0",
        "zero_optimization.stage3_a is 1: Extra inputs are not permitted",
    ):
        assert part in told
    assert told.endswith("; correct the file, or leave these out")
    assert "http" not in told and "DeepSpeedZeroConfig" not in told
