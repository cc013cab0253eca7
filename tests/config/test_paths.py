"""Paths in files and on command lines: ``~``, variables, relative to what names them, and files that come with us."""

import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.slurm import load_cluster
from megavar.config.base import Section
from megavar.config.choice import Choice
from megavar.config.cluster import ClusterConfig
from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.loading import dump, load_config
from megavar.config.root import Config
from megavar.config.roots import mark, place
from megavar.errors import ConfigError
from tools.shard_images import main as shard_images

ROOT = Path(__file__).parents[2]
RUN = f"base: {ROOT}/configs/quickstart/tokenizer.yaml\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home directory, a variable, and nothing of the checkout in the current directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/scratch/data")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_home_and_variables_mean_what_they_do_in_a_shell(tmp_path):
    source = "data: {source: {name: image_folder, path: $DATA/train, test_path: '${DATA}/val'}}\n"
    path = written(tmp_path / "home/a.yaml", RUN + source + "run: {directory: ~/runs/a}\n")
    config = load_config("~/a.yaml", ["train.initial_weights={path: ~/vae.pth}", "deepspeed=~/z.json"])
    assert config.run.path == f"{tmp_path}/home/runs/a"
    assert (config.data.source.path, config.data.source.test_path) == ("/scratch/data/train", "/scratch/data/val")
    assert config.train.initial_weights.path == f"{tmp_path}/home/vae.pth"
    assert config.deepspeed == f"{tmp_path}/home/z.json"
    assert load_config(path, ["run.directory=runs/a"]).run.path == "runs/a", "others stay as they are"


@pytest.mark.parametrize(
    ("directory", "message"),
    [("$SCRATCHX/a", r"run\.directory: \$SCRATCHX in the path .* is not set"), ("~nobody-here/a", "no home directory")],
)
def test_what_stands_for_nothing_is_refused(directory, message):
    """A folder of that name would be made."""
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/quickstart.yaml", [f"run.directory={directory}"])


def test_cluster_files_and_tools_expand_them_too(tmp_path, monkeypatch, capsys):
    written(tmp_path / "home/cordon", "n7\n")
    text = "exclude_file: ~/cordon\nnode_local_directory: $DATA/local\npython: ~/venv/bin/python\n"
    text += "container: {name: apptainer, image: ~/x.sif, mounts: ['$DATA:/d']}\n"
    written(tmp_path / "home/cluster.yaml", text)
    monkeypatch.setenv("MEGAVAR_CLUSTER", "$HOME/cluster.yaml")
    for cluster in (load_cluster("~/cluster.yaml"), load_cluster(None)):
        assert cluster.exclude_file == f"{tmp_path}/home/cordon"
        assert cluster.node_local_directory == "/scratch/data/local"
        assert cluster.python == f"{tmp_path}/home/venv/bin/python"
        assert (cluster.container.image, cluster.container.mounts) == (f"{tmp_path}/home/x.sif", ("/scratch/data:/d",))
    with pytest.raises(ConfigError, match=r"\$NOWHERE in the path"):
        load_cluster("$NOWHERE/cluster.yaml")
    with pytest.raises(SystemExit):
        shard_images(["--images", "$NOWHERE/images", "--out=~/shards"])
    assert "argument --images: $NOWHERE in the path" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_every_path_of_a_configuration_is_a_path():
    """Of a key that is called one, ``~`` is expanded: also where somebody adds a section."""
    assert Config.model_fields and ClusterConfig.model_fields
    named = ("path", "weights", "directory", "file", "cache", "reference", "requires", "prompts", "image", "deepspeed")
    plain = [
        f"{section.__module__}.{section.__name__}.{name}"
        for section in _subclasses(Section)
        if section.__module__.startswith("megavar.") and not (issubclass(section, Choice) and section.tag() is None)
        for name, field in section.model_fields.items()
        if name.split("_")[-1] in named and str in _leaves(field.annotation)
        and "expanded" not in f"{field.metadata} {field.annotation} {field!r}"
    ]  # fmt: skip
    known = {  # names of choices, of shards, and an image reference
        "megavar.config.train.InitialWeightsConfig.weights",
        "megavar.config.procedures.next_scale.NextScaleSampling.weights",
        "megavar.config.cluster.PyxisContainer.image",
    }
    assert set(plain) <= known


def _subclasses(kind: type) -> list[type]:
    return [one for below in kind.__subclasses__() for one in (below, *_subclasses(below))]


def _leaves(annotation: object) -> list[object]:
    arguments = typing.get_args(annotation)
    return [leaf for argument in arguments for leaf in _leaves(argument)] if arguments else [annotation]


def test_files_lie_beside_the_file_that_names_them(tmp_path):
    """Like ``base``, from wherever one starts; else they are looked for from the current directory, as ever."""
    folder = tmp_path / "project"
    written(folder / "ds/zero2.json", '{"zero_optimization": {"stage": 2}}')
    written(folder / "tokenizer.yaml", RUN + "run: {name: mine}\n")
    own = "deepspeed: ds/zero2.json\nrun: {requires: [tokenizer.yaml, ../other.yaml]}\n"
    path = written(folder / "sub/../run.yaml", RUN + own)
    written(folder / "deeper/run.yaml", "base: ../run.yaml\nrun: {name: deeper}\n")
    for given in (path, folder / "deeper/run.yaml", Path("../project/run.yaml")):
        config = load_config(given)
        assert load_deepspeed_json(Path(config.deepspeed))["zero_optimization"]["stage"] == 2
        assert config.run.requires == (f"{folder}/tokenizer.yaml", "../other.yaml")
        assert load_config(config.run.requires[0]).run.name == "mine"
    written(tmp_path / "work/ds/zero2.json", '{"zero_optimization": {"stage": 3}}')
    assert load_config(path).deepspeed == f"{folder}/ds/zero2.json"
    assert load_config(path, ["deepspeed=ds/zero2.json"]).deepspeed == "ds/zero2.json", "the command line's own"


def test_our_own_files_are_found_from_everywhere():
    config = load_config("configs/quickstart.yaml")
    assert load_config(config.run.requires[0]).run.name == "quickstart-tokenizer"
    assert load_deepspeed_json(Path(config.deepspeed)) == {"zero_optimization": {"stage": 0}}
    with pytest.raises(ConfigError, match=r"configs/quickstrat\.yaml cannot be read"):
        load_config("configs/quickstrat.yaml")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """``pip install .`` of a copy, offline; what it needs comes from this environment."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site") / "site-packages"
    for name in ("megavar", "launchers", "tools", "configs", "slurm", "setup.py", "pyproject.toml", "README.md"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--no-compile", "--disable-pip-version-check", "--target", str(target), str(source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def test_an_installed_package_needs_no_checkout(installed, tmp_path):
    """A batch script for a shipped configuration, whose tokenizer, DeepSpeed JSON and templates are shipped, too."""
    written(tmp_path / "cluster.yaml", "partition: main\ngpus_per_node: 0\n")
    code = (
        "import json, sys, launchers.slurm, megavar\n"
        "from pathlib import Path\n"
        "from megavar.config.deepspeed import load_deepspeed_json\n"
        "from megavar.config.root import Config\n"
        "default = load_deepspeed_json(Path(Config.model_fields['deepspeed'].default))\n"
        "print(json.dumps([megavar.__file__, default]))\n"
        "sys.exit(launchers.slurm.main(sys.argv[1:]))"
    )
    cluster = str(tmp_path / "cluster.yaml")
    arguments = ["submit", "configs/quickstart.yaml", "--nodes", "1", "--dry-run", "--cluster", cluster]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", env=environment)
    assert result.returncode == 0, result.stderr
    first, script = result.stdout.split("\n", 1)
    shipped = json.loads((ROOT / "configs/deepspeed/zero1.json").read_text())
    assert json.loads(first) == [f"{installed}/megavar/__init__.py", shipped]
    assert f"required=({tmp_path}/work/runs/quickstart-tokenizer)" in script and f"code_directory={installed}" in script
    assert sorted(path.name for path in installed.iterdir() if not path.name.endswith("dist-info")) == [
        "bin", "launchers", "megavar", "tools",
    ]  # fmt: skip


def test_all_paths_of_a_file_lie_in_its_root(tmp_path, monkeypatch):
    (tmp_path / "project/files").mkdir(parents=True)
    (tmp_path / "project/files/run.yaml").write_text(
        f"base: {ROOT / 'configs/quickstart.yaml'}\npaths: {{root: ..}}\nrun: {{name: mine}}\n"
        "data: {source: {name: image_folder, path: photos, test_path: /else/where}}\n"
    )
    monkeypatch.chdir(tmp_path)
    config, root = load_config("project/files/run.yaml"), tmp_path / "project"
    assert config.run.path == str(root / "runs/mine")
    assert (config.data.source.path, config.data.source.test_path) == (str(root / "photos"), "/else/where")
    assert config.deepspeed == load_config(ROOT / "configs/quickstart.yaml").deepspeed, "named by another file"
    given = load_config("project/files/run.yaml", ["data.source.path=here", "run.name=other"])
    assert given.data.source.path == "here", "a command line means the current directory"
    assert given.run.path == str(root / "runs/other")
    (tmp_path / "wrong.yaml").write_text("paths: here\n")
    with pytest.raises(ConfigError, match="paths must be"):
        load_config("wrong.yaml")


WRITTEN = "files/mine"


def trees(section: type[Section], key: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    """For every path key of a section and of those in it, whichever alternatives: a tree that holds nothing else."""
    for name, field in section.model_fields.items():
        if "expanded" in f"{field.metadata} {field.annotation}":
            several = typing.get_origin(field.annotation) is tuple
            yield f"{key}{name}", {name: [WRITTEN] if several else WRITTEN}
            continue
        for below in sections_in(field.annotation):
            chosen = {below.discriminator: below.tag()} if issubclass(below, Choice) else {}
            if not chosen and "name" in below.model_fields:
                chosen = dict(zip(["name"], typing.get_args(below.model_fields["name"].annotation)))
            several = typing.get_origin(field.annotation) is tuple
            for where, tree in trees(below, f"{key}{name}."):
                tree = {**chosen, **tree}
                yield where, {name: [tree] if several else tree}


def sections_in(annotation: object) -> list[type[Section]]:
    found = [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, Section)]
    kinds = [one for one in found if issubclass(one, Choice) and one.tag() is None]
    return [one for one in found if one not in kinds] + [one for kind in kinds for one in kind.alternatives().values()]


def plain(tree: object) -> list[str]:
    if isinstance(tree, dict | list):
        return [leaf for value in (tree.values() if isinstance(tree, dict) else tree) for leaf in plain(value)]
    return [str(tree)]


def test_every_path_key_of_every_section_is_relative_to_its_file_or_root(tmp_path):
    """Walked mechanically, so that a section that somebody adds is walked, too."""
    beside, root, folder = tmp_path / "beside", tmp_path / "root", tmp_path / "nothing"
    written(beside / WRITTEN, "")
    keys = set()
    for section in (Config, ClusterConfig):
        for key, tree in trees(section):
            keys.add(key)
            for marked, expected in (
                (mark(beside, tree), str(beside / WRITTEN)),
                (mark(folder, tree), WRITTEN),  # from the current directory
                (mark(folder, tree, str(root)), str(root / WRITTEN)),
            ):
                assert expected in plain(place(marked, section)), (key, expected)
    assert keys >= {"run.requires", "deepspeed", "data.source.sources.path", "recipe.terms.teacher.weights",
                    "evaluation.reconstruction.lpips_alex.linear", "exclude_file", "train.initial_weights.path"}, keys


def test_paths_of_a_run_are_found_already(tmp_path):
    """A run's own files are none that its configuration means, and neither are those beside a copy of it."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["recipe.tokenizer_weights=samples"])
    written(tmp_path / "run/config.yaml", dump(config))
    (tmp_path / "run/samples").mkdir()
    assert load_config(tmp_path / "run").recipe.tokenizer_weights == "samples"
