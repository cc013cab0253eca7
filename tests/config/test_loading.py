"""YAML, inheritance, overrides, and errors that name key, problem and remedy."""

from pathlib import Path

import pytest

from megavar.config.loading import apply_override, dump, load_config, merge, read_tree
from megavar.errors import ConfigError

QUICKSTART = Path("configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    return str(caught.value)


def test_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    config = load_config(QUICKSTART)
    assert load_config(write(tmp_path / "config.yaml", dump(config))) == config


def test_overrides_reach_nested_keys_and_read_scientific_notation() -> None:
    config = load_config(QUICKSTART, ["optimizer.lr=3e-4", "generator.experts.top_k=2", "tokenizer.scales=[1,4]"])
    assert config.optimizer.lr == 3e-4
    assert config.generator is not None and config.generator.experts is not None
    assert config.generator.experts.top_k == 2
    assert config.tokenizer.scales == (1, 4)


def test_own_keys_win_over_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", QUICKSTART.read_text().replace("base: quickstart/base.yaml", ""))
    path = write(tmp_path / "run.yaml", "base: base.yaml\ntokenizer: {}\ntrain: {steps: 7}\nrun: {name: other}\n")
    config = load_config(path)
    assert (config.train.steps, config.train.global_batch_size, config.run.name) == (7, 64, "other")
    assert config.run.requires == ("configs/quickstart/tokenizer.yaml",)


def test_an_alternative_of_another_name_replaces_the_base() -> None:
    base = {"source": {"name": "photographs", "length": 5}, "run": {"name": "a", "requires": ["x"]}}
    top = {"source": {"name": "digits"}, "run": {"name": "b"}}
    assert merge(base, top) == {"source": {"name": "digits"}, "run": {"name": "b", "requires": ["x"]}}


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("url", ["https://me:geheim42@host/{shard}", "pipe:TOKEN=geheim42 fetch {shard}"])
def test_secrets_are_not_kept_in_config_yaml(url: str) -> None:
    error = error_of(f"data.source={{name: webdataset, path: x, order: stream, url: '{url}'}}")
    assert "data.source.url" in error and "looks like a secret" in error and "geheim42" not in error
    by_variable = url.replace("me:geheim42", "$USER:$PASS").replace("geheim42", "$FETCH_TOKEN")
    if url.startswith("pipe:"):
        load_config(QUICKSTART, [f"data.source={{name: webdataset, path: x, order: stream, url: '{by_variable}'}}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rat=1", ["Unknown key optimizer.learning_rat", "Valid keys", "lr"]),
        ("train.globl_batch_size=8", ["Unknown key train.globl_batch_size", "'global_batch_size'"]),
        ("generator.experts.topk=2", ["Unknown key generator.experts.topk", "'top_k'"]),
        ("data.source.lenght=3", ["Unknown key data.source.lenght"]),
        ("recipe.labelsmoothing=0.1", ["Unknown key recipe.labelsmoothing", "'label_smoothing'"]),
        ("data.source.name=digit", ["data.source.name is 'digit'", "Did you mean 'digits'?"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("train.global_batch_size=0", ["train.global_batch_size", "greater than or equal to 1"]),
        ("generator.experts.top_k=9", ["generator.experts", "top_k=9 exceeds number=8"]),
        ("generator.width=97", ["width=97 is not a multiple of heads=4"]),
        ("train.epochs=2", ["train", "either as steps or as epochs"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite number"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite number"]),
        ("optimizer.lr=1000", ["optimizer.lr", "less than or equal to 100"]),
        ("optimizer.lr=0", ["optimizer.lr", "greater than 0"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas", "less than 1"]),
        ("optimizer.betas=[-0.1, 0.9]", ["optimizer.betas", "greater than or equal to 0"]),
        ("optimizer.betas=[0.9, .nan]", ["optimizer.betas", "finite number"]),
        ("optimizer.modules.generator.betas=[0.9, 2]", ["optimizer.modules.generator.betas", "less than 1"]),
        ("optimizer.modules.generatr.lr=1", ["names 'generatr'", "trains 'generator'", "Did you mean"]),
        ("optimizer.modules.discriminator.lr=1", ["names 'discriminator'", "'mepa' trains 'generator'"]),
        ("train.ema={modules: [autoencoder]}", ["train.ema.modules names 'autoencoder'"]),
        ("optimizer.modules.generator.lr=.inf", ["optimizer.modules.generator.lr", "finite number"]),
        ("optimizer.gradient_clipping=.inf", ["optimizer.gradient_clipping", "finite number"]),
        ("optimizer.epsilon=1", ["optimizer.epsilon", "less than 1"]),
        ("train.ema.decay=.nan", ["train.ema.decay", "finite number"]),
        ("train.watchdog.factor=.inf", ["train.watchdog.factor", "finite number"]),
        ("sampling.temperature=.inf", ["sampling.temperature", "finite number"]),
        ("train.cpu_threads=100000", ["train.cpu_threads", "less than or equal to 1024"]),
        ("data.workers=100000", ["data.workers", "less than or equal to 256"]),
        (f"train.steps={10**400}", ["train.steps", "401 digits"]),
        (f"train.seed={2**63}", ["train.seed", "2**63 - 1"]),
        (f"sampling.seed={-(2**63) - 1}", ["sampling.seed", "2**63 - 1"]),
        ("optimizer.schedule={name: cosine, warmup_steps: 100000}", ["warmup_steps=100000 is longer than the run"]),
    ],
)
def test_wrong_values_are_explained(override: str, expected: list[str]) -> None:
    message = error_of(override)
    assert "configs/quickstart.yaml" in message and "\n" not in message
    for part in expected:
        assert part in message, message


def test_all_problems_are_reported_at_once() -> None:
    message = error_of("train.stepz=1", "optimizer.betta=2")
    assert "train.stepz" in message and "optimizer.betta" in message


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_malformed_overrides(override: str) -> None:
    assert "dotted.key=value" in error_of(override)


def test_override_through_a_value() -> None:
    assert "holds 'quickstart' and no keys" in error_of("run.name.x=3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 1\n", "not valid YAML"),
        ("- a\n- b\n", "does not hold keys"),
        ("train: {}\ntrain: {}\n", "appears twice"),
        ("base: missing.yaml\n", "missing.yaml cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path / "run.yaml", text))


def test_no_weights_by_the_earlier_key_means_none_whatever_a_base_says(tmp_path):
    (tmp_path / "base.yaml").write_text("recipe: {name: tokenizer, initial_weights: runs/x}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nrecipe: {initial_weights: null}\n")
    assert read_tree(tmp_path / "base.yaml")["train"]["initial_weights"]["path"] == "runs/x"
    assert read_tree(tmp_path / "run.yaml")["train"]["initial_weights"] is None
    tree = read_tree(tmp_path / "base.yaml")
    apply_override(tree, "recipe.initial_weights=null")
    assert tree["train"]["initial_weights"] is None
