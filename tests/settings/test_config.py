"""Settings: files and overrides become one frozen Config, or an error that says what to change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import LexiconError
from mlip.settings import config, typed_tree
from mlip.settings.bounds import BOUNDS
from mlip.settings.config import ConfigError
from mlip.settings.strict_yaml import read_yaml
from mlip.settings.transfer import BY_FRACTION

ROOT = Path(__file__).resolve().parents[2]


def _write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    file = _write(tmp_path, "run: {seed: 2}\ntrain: {lr: 1e-3, warmup_steps: 5}\n")
    loaded = config.load([file], ["train.warmup_steps=7"])
    assert (loaded.run.seed, loaded.train.lr, loaded.train.warmup_steps) == (2, 1e-3, 7)
    for name in ("runs/lr=0.1", "0.1", "7"):
        assert config.load([], [f"run.dir={name}"]).run.dir == name


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("run.sead=1", "run.seed"),
        ("seed=1", "run.seed"),
        ("train.seed=1", "'run.seed'"),
        ("train.warmup_step=1", "'train.warmup_steps'"),
        ("loss.global.weight=1", "loss.global_contrastive"),
        ("loss.globl.weight=1", "loss.global_contrastive"),
        ("batch.global_pair=8", "batch.global_pairs"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        config.load([], [key])


WRONG = """
run.seed=abc run.seed=1.5 run.seed=-1 run.exact=1 run.threads=-1 run.timeout_s=0 run.dir=null run=3
data.pipeline=fast data.channels=2 data.crop_px=0 data.crop_px=999 data.max_tokens=2 data.std=0
run.threads=1000000 run.timeout_s=1e19 data.resize_px=1000000000 data.max_tokens=1000000000
batch.global_pairs=1000000000 train.lr=1e300
data.mean=.inf data.mean=9e18 data.vocab_size=0
data.vocab_min_patients=0 data.max_entities=-1 data.bad_share=2
data.workers=-1
data.prefetch=0 data.columns.image=null data.augment.brightness=1 data.augment.contrast=-0.1
data.augment.rotation_degrees=-5 data.augment.sentence_dropout=1.5 data.phantom.studies=-1
batch.global_pairs=1 batch.global_pairs=[32] batch.global_pairs=3.5 batch.micro_images=-1
train.max_steps=-5 train.epochs=-1 train.lr=-1e-3 train.lr=.nan train.lr=fast train.lr=[1e-3]
train.weight_decay=-1 train.betas=[0.9] train.betas=0.9 train.betas=[0.9,1.0] train.warmup_steps=-1
train.min_lr_share=2 train.clip_norm=-1 train.ema_decay=1 train.precision=fp16 train.zero_stage=4
train.checkpoint_steps=0 train.keep_checkpoints=0 train.log_steps=0 train.max_nan_steps=0
train.zero_stage=true data.channels=3.0 transfer.seeds=3 train.lr=true run.dir=true run.seed=true
train.spike_factor=0.5 model.embed_dim=0 model.vision.kind=vgg model.vision.patch_pool=0
model.vision.patch_stage=-1 model.vision.options=3 model.heads.hidden=0 model.divergence.dropout=1
knowledge.dim=0 knowledge.weight_present=-1 loss.matching.layers=0 loss.swapping.probability=2
loss.category.weight=-1 loss.category.prototypes=1 loss.category.sinkhorn_temperature=0
loss.local_alignment.knowledge_share=2 loss.local_alignment.aggregation_scale=0
evaluate.max_studies=0 evaluate.retrieval_pool=1 evaluate.bootstrap=0 evaluate.examples=-1
evaluate.positive_prompts=[] evaluate.negative_prompts=["no."] evaluate.positive_prompts=["{}{}."]
transfer.lr=-1 transfer.weight_decay=-1 transfer.encoder_lr=-1 transfer.epochs=0 transfer.batch=0
transfer.patience=0 transfer.image_px=-64 transfer.seeds=[-1] transfer.fractions=[0]
transfer.fractions=[101] transfer.fractions=[] transfer.val_share=1 transfer.iou_thresholds=[1.0]
transfer.score_cut=2 transfer.nms_iou=-1 transfer.cache_gib=-1 transfer.decoder_width=-4
transfer.by_fraction={"1":{"batch":0}} transfer.by_fraction={"10":{"lr":-1}}
train.epochs=.inf model.text.options={"hidden_dropout_prob":.nan}
transfer.seeds=[] transfer.seeds=[1,2,1] transfer.iou_thresholds=[]
transfer.classes={"Edema":"maybe"}
transfer.by_fraction={"few":{"lr":1}} transfer.by_fraction={"1":{"lr":"fast"}}
transfer.by_fraction={"1":{"lr":"-1e-4"}} transfer.by_fraction={"1":{"lr":"nan"}}
transfer.by_fraction={"1":{"lr":true}} transfer.by_fraction={"1":{"batch":8.5}}
transfer.by_fraction={"1":{"epochs":"0"}} transfer.by_fraction={"1":{"lr":1},"1.0":{"batch":8}}
transfer.by_fraction={"0":{"lr":1}} transfer.by_fraction={"101":{"lr":1}}
transfer.by_fraction={"nan":{"lr":1}} transfer.by_fraction={"1":null}
transfer.by_fraction={"1":{"lr":1,"batch":8.5}}
transfer.encoder_lr=1e-4 transfer.fractions=[1,10,1.0] transfer.columns.source_height=h
transfer.fractions=[33.3333333,33.3333334] transfer.iou_thresholds=[0.5,0.5] transfer.subset=valid
""".split()


# whole numbers that no float or no counter of torch's holds: OverflowError, and a traceback
TOO_BIG = [
    *(f"{key}={10**400}" for key in ("train.max_steps", "train.lr", "run.seed")),
    *("model.embed_dim=99999999999999999999", "train.epochs=1e308"),
    f"transfer.seeds=[{10**400}]",
]


@pytest.mark.parametrize("override", [*WRONG, *TOO_BIG], ids=lambda text: text[:60])
def test_a_wrong_value_is_an_error_that_names_its_key(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        config.load([], [override])


def test_a_number_of_a_tower_is_looked_at_by_the_tower() -> None:
    loaded = config.load([], [f"model.text.options={{hidden_size: {10**400}}}"])
    assert loaded.model.text.options == {"hidden_size": 10**400}


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    # two are lists of choices
    lists = ("transfer.fractions", "transfer.seeds", "transfer.iou_thresholds")
    defaults = typed_tree.flatten(dataclasses.asdict(config.load()))
    numbers = {
        key
        for key, value in defaults.items()
        if not isinstance(value, bool)
        if isinstance(value, int | float) or key == "train.betas" or key in lists
    }
    assert numbers - {"data.channels", "train.zero_stage"} == set(BOUNDS)


def test_micro_batches_with_batch_statistics_are_refused() -> None:
    for key in ("micro_images", "micro_texts"):
        with pytest.raises(ConfigError, match="model.vision.norm"):
            config.load([], [f"batch.{key}=8"])


@pytest.mark.parametrize(
    "settings",
    [
        "train.max_steps=0 train.epochs=0",
        "model.heads.norm=batch run.exact=true model.vision.norm=group",
        "train.optimizer=muon train.zero_stage=1",
        "train.offload=true train.zero_stage=0",
        "transfer.precision=bf16 transfer.task=classification transfer.classes={Edema:,one}",
        "transfer.fit=stretch transfer.task=classification transfer.classes={Edema:,one}",
        "transfer.classes={} transfer.task=classification",
        "transfer.exclusive=true transfer.classes={Edema:,one} transfer.task=classification",
        "transfer.probe=logistic transfer.encoder=tuned",
        "transfer.probe=logistic transfer.task=segmentation",
        "transfer.exclusive=true transfer.classes={A:,one,B:,one}",
        "transfer.balance=true transfer.exclusive=true transfer.classes={A:,one,B:,one} "
        "transfer.task=classification",
        "transfer.compat_score_cut=0.1 transfer.score_cut=0.2 transfer.task=detection",
        "evaluate.subset=valid transfer.task=segmentation",
        "evaluate.exclusive=true transfer.task=detection",
    ],
)
def test_two_settings_that_cannot_stand_together_are_refused(settings: str) -> None:
    with pytest.raises(ConfigError, match=settings.split("=")[0].replace(".", r"\.")):
        config.load([], [item.replace(":,", ": ") for item in settings.split()])


def test_subset_and_exclusive_of_the_other_kind_are_named_with_what_takes_them_away() -> None:
    """A run that scored a subset has it in its settings, over which a task is laid."""
    for unread, read, off in (
        ("evaluate.subset=valid", "transfer.subset", "null"),
        ("evaluate.exclusive=true", "transfer.exclusive", "false"),
    ):
        name, task = unread.split("=")[0], "transfer.task=classification"
        classes = "transfer.classes={A: one, B: one}"
        told = rf"set {read} instead, or leave it out \({name}={off}\)"
        with pytest.raises(ConfigError, match=told):
            config.load([], [unread, task, classes])
        config.load([], [unread, task, classes, f"{name}={off}"])
        config.load([], [unread])  # without a task it is read
    config.load([], ["transfer.subset=valid", "transfer.task=segmentation"])
    with pytest.raises(ConfigError, match=r"task=detection: leave it out \(evaluate.exclusive="):
        config.load([], ["evaluate.exclusive=true", "transfer.task=detection"])


@pytest.mark.parametrize(
    "settings, said",
    [
        ("exclusive=true task=segmentation classes={A:,one,B:,one}", "False"),
        ("blank=ignore task=detection", "zero"),
        ("probe=logistic task=detection", "adamw"),
        ("fit=stretch task=classification classes={A:,one}", "letterbox"),
        ("precision=auto task=classification classes={A:,one}", "fp32"),
    ],
)
def test_what_another_task_reads_is_refused_with_what_takes_it_away(
    settings: str, said: str
) -> None:
    """transfer.exclusive with masks or boxes was passed over."""
    given = [f"transfer.{item.replace(':,', ': ')}" for item in settings.split()]
    name, _, value = given[0].partition("=")
    with pytest.raises(ConfigError, match=rf"{name}=.* is for .*task=.* \({name}={said}\)"):
        config.load([], given)
    if name != "transfer.exclusive":  # that needs classes, and is refused without a task too
        config.load([], given[:1])


def test_what_a_task_can_honour_is_not_refused() -> None:
    for settings in (
        ["transfer.task=detection", "transfer.compat_score_cut=0.2", "transfer.score_cut=0.2"],
        ["transfer.compat_score_cut=0.1", "transfer.score_cut=0.2"],  # of a task that is not run
        ["transfer.probe=logistic"],
        ["transfer.fractions=[33.333,33.334]"],
        ["transfer.seeds=[7]", "transfer.iou_thresholds=[0.5]"],
        [
            "transfer.task=classification",
            "transfer.exclusive=true",
            "transfer.classes={A: one, B: one}",
        ],
        ['transfer.by_fraction={"100":{"lr":1.0e-4},"1":{"batch":8}}'],
        [f"transfer.by_fraction.1.{name}=3" for name in BY_FRACTION],
    ):
        config.load([], settings)


@pytest.mark.parametrize("setting", ["patch_pool=2", "patch_stage=1", "norm=group"])
def test_what_a_vit_does_not_have_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}.* of a ResNet and would do nothing"):
        config.load([], ["model.vision.kind=vit", f"model.vision.{setting}"])
    config.load([], [f"model.vision.{setting}"])


@pytest.mark.parametrize("setting", ["train.offload=true", "train.zero_stage=2"])
def test_the_plain_engine_refuses_what_it_would_not_do(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"train.engine=plain with .*{setting.split('=')[0]}"):
        config.load([], ["train.engine=plain", setting.replace("true", "True")])
    config.load([], [setting])


def test_attention_of_packed_reports_wants_packed_reports() -> None:
    with pytest.raises(ConfigError, match="set model.text.packed=true"):
        config.load([], ["model.attention=varlen"])
    packed = ["model.attention=varlen", "model.text.packed=true"]
    config.load([], packed)
    with pytest.raises(ConfigError, match="train.compile with model.attention=varlen"):
        config.load([], [*packed, "train.compile=true"])


def test_a_config_survives_its_own_dictionary() -> None:
    loaded = config.load([ROOT / "configs" / "demo.yaml"], ["run.seed=5"])
    assert config.from_dict(config.to_dict(loaded)) == loaded


def test_what_an_earlier_version_saved_is_read_without_the_column_that_nothing_read(
    tmp_path: Path,
) -> None:
    loaded = config.load([ROOT / "configs" / "demo.yaml"])
    earlier = config.to_dict(loaded)
    earlier["data"]["columns"]["view"] = "ViewPosition"
    assert config.from_dict(earlier) == loaded
    assert earlier["data"]["columns"]["view"] == "ViewPosition"  # the caller's own, left alone
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier))  # as a run keeps them
    assert config.load([tmp_path / "config.yaml"]) == loaded
    with pytest.raises(ConfigError, match="unknown key 'data.columns.view'"):
        config.load([], ["data.columns.view=view"])


def test_a_saved_run_is_read_with_settings_that_are_refused_today_because_they_do_nothing() -> None:
    tree = config.to_dict(config.load([], ["model.vision.kind=vit"]))
    tree["model"]["vision"]["patch_pool"] = 2
    assert config.from_dict(tree).model.vision.patch_pool == 2
    with pytest.raises(ConfigError, match=r"data.crop_px=0: expected 1 to 16384"):
        config.from_dict({**tree, "data": {**tree["data"], "crop_px": 0}})
    with pytest.raises(ConfigError, match=r"saved config: unknown key 'run.sead'"):
        config.from_dict({**tree, "run": {"sead": 1}})
    with pytest.raises(ConfigError, match="would do nothing"):
        config.load([], ["model.vision.kind=vit", "model.vision.patch_pool=2"])


def test_difference_lists_what_changed() -> None:
    left = config.load([], ["run.seed=1"])
    right = config.load([], ["run.seed=2", "train.lr=0.5"])
    assert config.difference(left, right) == {"run.seed": (1, 2), "train.lr": (2e-5, 0.5)}
    tower = config.load([], ["run.seed=1", "model.text.options={hidden_size: 16}"])
    assert config.difference(left, tower)["model.text.options.hidden_size"] == (None, 16)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load().run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["- a\n- b\n", "run: [1\n", "!!python/object:os.system {}\n"])
def test_a_file_that_is_no_mapping_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="run.yaml"):
        config.load([_write(tmp_path, text)])


def test_a_file_with_an_unknown_key_or_other_letters_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'run.sead'"):
        config.load([_write(tmp_path, "run: {sead: 1}\n")])
    (tmp_path / "run.yaml").write_bytes("run: {dir: L\u00e4ufe}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read: .*utf-8"):
        config.load([tmp_path / "run.yaml"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads_and_opens_with_its_command(path: Path) -> None:
    base = [ROOT / "configs" / "demo.yaml"] if path.name.startswith("demo_") else []
    config.load([*base, path])
    opening = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert any(path.name in line and ("deepspeed" in line or "mlip" in line) for line in opening)


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "- " * 5000 + "x", "{a: " * 5000])
def test_yaml_of_thousands_of_levels_is_refused(text: str, tmp_path: Path) -> None:
    """The C parser calls itself for each level: 100,000 of a lexicon or a config killed Python."""
    for place in (tmp_path / "c.yaml", tmp_path / "l.yaml"):
        place.write_text("data:\n  " + text)
    # PyYAML 6.0.4 counts brackets itself, to as many
    told = r"\.yaml: [\s\S]*line 2(: expected at most 1000 levels|, column [0-9]+)"
    with pytest.raises(ConfigError, match="c" + told):
        config.load([tmp_path / "c.yaml"])
    with pytest.raises(LexiconError, match="l" + told):
        load_concepts(tmp_path / "l.yaml")
    many = "a: [" + ", ".join(["[x]"] * 2000) + "]"  # brackets beside one another
    assert len(read_yaml(many)["a"]) == 2000


def test_a_section_that_stands_twice_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """The later one won in silence: the first data section's manifest and columns were gone."""
    path = tmp_path / "c.yaml"
    path.write_text("data: {manifest: a.csv, crop_px: 96}\nrun: {seed: 1}\ndata: {crop_px: 64}\n")
    with pytest.raises(ConfigError, match="c.yaml.*'data' stands in lines 1 and 3"):
        config.load([path])
    with pytest.raises(ConfigError, match="override data: .*'crop_px' stands in lines 1 and 1"):
        config.load([], ["data={crop_px: 64, crop_px: 96}"])
    path.write_text("data: {crop_px: 96}\nrun: {seed: 1}\n")
    assert config.load([path]).data.crop_px == 96
    # YAML's own way of putting one mapping into another may stand twice
    path.write_text("run: &a {seed: 3}\ntrain: &b {lr: 0.5}\n")
    both = read_yaml(f"{path.read_text()}both:\n  <<: *a\n  <<: *b\n")["both"]
    assert both == {"seed": 3, "lr": 0.5}
    path.write_text("# nothing yet\n")
    assert config.load([path]) == config.load()


def test_one_name_for_a_list_of_files_or_overrides_is_said() -> None:
    """A string is a list of letters: the file c of configs/demo.yaml was not found."""
    for alone in ("configs/demo.yaml", Path("configs/demo.yaml")):
        with pytest.raises(ConfigError, match="files: expected a list, got 'configs/demo.yaml' al"):
            config.load(alone)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="overrides: expected a list, got 'run.seed=2' alone"):
        config.load([], "run.seed=2")


def test_a_path_that_begins_with_the_home_folder_is_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves run.dir=~/runs as it is: the run went to a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a.yaml"
    file.write_text("data: {manifest: ~/data/manifest.csv}\n")
    made = config.load([file], ["run.dir=~/runs/mine"])
    assert made.run.dir == f"{tmp_path}/runs/mine"
    assert made.data.manifest == f"{tmp_path}/data/manifest.csv"


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    """runs/lr=0.1/config.yaml was an override of an unknown key."""
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "config.yaml").touch()
    items = [str(folder / "config.yaml"), "configs/demo.yaml", "run.seed=2"]
    assert config.sort_settings(items) == (items[:2], items[2:])


@pytest.mark.parametrize("name", ["runs/lr 1 #2", "-run\nof two lines", "a  b"])
def test_an_override_takes_a_name_as_it_is_typed(name: str) -> None:
    """A second run, "run #2", went on in the folder of the first one, "run"."""
    assert config.load([], [f"run.dir={name}"]).run.dir == name
    assert config.load([], [f"run.dir='{name}' # quoted"]).run.dir.split() == name.split()
    assert config.load([], ["run.seed=3 # three"]).run.seed == 3


def test_an_override_longer_than_a_file_name_may_be_is_one() -> None:
    item = f"model.vision.options={{{', '.join(f'setting_{i}: {i}' for i in range(40))}}}"
    assert len(item) > 255
    assert config.sort_settings([item]) == ([], [item])


def _run_of(folder: Path, **run: object) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"run": run}))
    return folder


@pytest.mark.parametrize("content", ["", "{}", "null", "# cut\n"])
def test_an_emptied_file_of_a_run_is_no_run_of_default_settings(
    tmp_path: Path, content: str
) -> None:
    run = _run_of(tmp_path / "run", seed=7)
    (run / "config.yaml").write_text(content)
    with pytest.raises(config.ConfigError, match=r"run/config\.yaml: is empty: expected"):
        config.load([run])
    (tmp_path / "own.yaml").write_text(content)
    assert config.load([tmp_path / "own.yaml"]).run.seed == config.Config().run.seed


def test_a_run_that_was_moved_is_the_one_whose_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of a run was embedded with the weights of the run at its old place, with code 0."""
    monkeypatch.chdir(tmp_path)
    moved = _run_of(Path("runs/lr=0.1"), dir="runs/mine", seed=7)
    _run_of(Path("runs/mine"), dir="runs/mine", seed=8)
    assert config.sort_settings([str(moved)]) == ([str(moved)], [])
    for named in (moved, moved / "config.yaml", tmp_path / moved):
        made = config.load([named])
        assert (Path(made.run.dir).resolve(), made.run.seed) == (tmp_path / moved, 7)
        assert "lr=0.1, where" in caplog.text and "it names runs/mine" in caplog.text
        caplog.clear()
    assert config.load([moved], ["run.dir=other"]).run.dir == "other"
    caplog.clear()
    assert config.load(["runs/mine/config.yaml"]).run.dir == "runs/mine"
    Path("config.yaml").write_text("run: {dir: runs/new}\n")  # no run's
    Path("runs/mine/next.yaml").write_text("run: {dir: runs/new}\n")  # nor is this
    for named in ("config.yaml", "runs/mine/next.yaml"):
        assert config.load([named]).run.dir == "runs/new"
    assert not caplog.text
    Path("runs/mine/config.yaml").write_text("run: {seed: 8}\n")  # cut by hand
    assert config.load(["runs/mine"]).run.dir == "runs/mine"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("runs", "is a folder without config.yaml; .* named as checkpoint=runs"),
        ("run.seed", "is a setting; expected run.seed=value, without spaces"),
        ("\u2013-split", "begins with a dash of a printed page; expected the two of a keyboard"),
        ("-\u2013split", "begins with a dash of a printed page"),
        ("\u2014split", "begins with a dash of a printed page"),
        ("=", "there is no such file; expected a YAML file, the folder of a run, or key=value"),
    ],
)
def test_what_is_no_file_is_said_with_what_was_meant(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match=told):
        config.load([name])
