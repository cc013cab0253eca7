"""Every command that README or a page shows is run at small size, or, where it cannot be, is understood."""

import re
from pathlib import Path

import pytest

from megavar.config.loading import load_config
from tests.docs.commands import PAGES, ROOT, Shown, blocks, inline, shown
from tests.docs.workshop import SMALL, Workshop, module_of

pytestmark = pytest.mark.end_to_end
README = ROOT / "README.md"
CI, SLURM = "CI does it: a fresh environment, its packages, all tests", "tests/slurm: Slurm's own program"
GPU = "tests/tools/test_gpu_check.py: for a machine with a GPU"
OTHERS = {
    "venv": CI, ".": CI, "pip": CI, "pytest": CI, "apt-get": CI,
    "sbatch": SLURM, "scancel": SLURM, "scontrol": SLURM, "squeue": SLURM,
    "tail": "tests/slurm/test_digits_runs.py",
    "torchrun ...": "VAR's own command", "torchrun --nproc-per-node": "a part of a command",
    "tools/gpu_wheels.sh": "downloads wheels",
}  # fmt: skip
"""Programs that are not ours, or need a network: why they do not run here."""
OTHER_FAMILY = "a configuration that is not in SMALL, or a run of it"
RUNS = re.compile(r"\bruns/(?!photos|longer|others?\b|new\b|stmoe-d16|mepa-d16|var-d16)")
ELSEWHERE = {
    "megavar train configs/mepa/guided_digits.yaml": "tests/end_to_end/test_guidance.py",
    "megavar train 8 ranks": "tests/distributed: the layout is checked here, and its plan in tests/planning",
    "megavar evaluate --understanding": "tests/evaluation/understanding/test_models.py: a vision-language model",
    "megavar plan --calibrate": "tests/planning/test_calibration.py",
    "megavar plan --calibration": "tests/planning/test_calibration.py",
    "megavar reproduce --demo": "tests/end_to_end/test_demo.py: minutes to hours",
    "megavar reproduce --submit": "tests/reproduction/test_command.py: a process per row",
    "megavar analyze": "tests/end_to_end, tests/analysis: of runs of other kinds",
    "launchers.local": "tests/launchers/test_local.py: processes of its own",
    "tools.cache_tokens --teacher": "tests/tools/test_cache_tokens.py: with a teacher",
    "tools.shard_images --existing": "tests/sources/test_webdataset.py: tars of another tool",
    "tools.convert_checkpoint --into": "tests/distributed/test_query_ar_runs.py: runs that began with a folder",
    "tools.evaluate_fid score": "tests/tools/test_evaluate_fid.py: published weights",
    "tools.benchmark": "tests/tools/test_benchmark.py",
    "tools.benchmark_data": "tests/tools/test_benchmark_data.py",
    "tools.benchmark_features": "tests/tools/test_benchmark_features.py",
    "tools.benchmark_recipes": "tests/tools/test_benchmark_recipes.py",
    "tools.benchmark_against": "tests/tools/test_benchmark_against.py: a checkout of VAR",
    "tools.gpu_check": GPU,
    "tools.small_vlm": "tests/end_to_end/test_vgt.py: a minute for each network",
    "tools.reference_curve": "tests/tools/test_reference_curve.py: runs with three seeds",
    "tools.configuration_reference": "tests/docs/test_pages.py",
    OTHER_FAMILY: "tests/recipes, tests/generators, tests/distributed: short runs of each family",
}
"""What has a test of its own and is only understood here, by program, or program and an argument: where, and why."""
ANALYSES = {"expert_load", "convergence"}
"""Those that run here."""


def elsewhere(command: Shown) -> str | None:
    """Why a command of ours does not run here."""
    words = {command.program, *(f"{command.program} {word}" for word in command.arguments)}
    if command.ranks > 1:
        words.add(f"{command.program} {command.ranks} ranks")
    if command.program == "megavar analyze" and (command.arguments[0] in ANALYSES or command.arguments[0] == "KIND"):
        return None
    shipped = [word for word in command.arguments if word.startswith("configs/") and "/tables/" not in word]
    if set(shipped) - set(SMALL) or any(map(RUNS.search, command.arguments)):
        words.add(OTHER_FAMILY)
    return min(words & set(ELSEWHERE), default=None, key=list(ELSEWHERE).index)


def form(command: Shown, words: list[str]) -> tuple[object, ...]:
    """Commands of one form differ in values alone: which run, which number."""
    options = sorted(word for word in words if word.startswith("-"))
    keys = sorted(word.split("=")[0] for word in words if "=" in word)
    configs = sorted(word for word in words if word in SMALL)
    return command.program, *options, *keys, *configs, len([word for word in words if word.startswith("runs/")])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def said(workshop: Workshop) -> dict[object, str]:
    """By form: what the commands printed that have run, those of a new user first."""
    found: dict[object, str] = {}
    for command in shown(README, "## Your own photographs"):
        found[form(command, workshop.words(command))] = found[command.program] = workshop.run(command)
    return found


@pytest.mark.timeout(900)
def test_a_new_user_goes_from_photographs_to_a_report(workshop: Workshop, said: dict[str, str]) -> None:
    folder = workshop.folder
    assert "fid" in said["megavar train"], "it is scored by itself"
    assert "photos" in said["megavar status"] and "4/4" in said["megavar status"]
    assert "finished" in said["megavar status"]
    assert len(list((folder / "out").rglob("*.png"))) == 3 * 8 + 1
    assert {path.name.split("-")[1] for path in (folder / "out/guidance-4").glob("*.png")} == {"cat.png", "dog.png"}
    page = (folder / "runs/photos/report/report.html").read_text()
    assert "finished at step 4 of 4" in page and "cat, dog" in page and "Samples by guidance" in page
    assert 'id="figure-experts"' in page and 'id="figure-routing"' in page and "label_accuracy" in page
    assert len(page) < 3e6
    assert "goes on from step 4" in said["megavar fork"] and "train.steps: 4 -> 6" in said["megavar fork"]
    assert "train.steps" in said["megavar compare"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, workshop: Workshop, said: dict[object, str]) -> None:
    for command in shown(page):
        if command.program in OTHERS or f"{command.program} {' '.join(command.arguments[:1])}" in OTHERS:
            continue
        if command.inline and command.arguments in ((), ("KIND",)):
            is_known(command)
            continue
        workshop.resolve(command)
        words = workshop.words(command)
        if elsewhere(command) is None and form(command, words) not in said:
            said[form(command, words)] = workshop.run(command)


def is_known(command: Shown) -> None:
    """A name in a sentence, such as ``python -m tools.benchmark``, is that of a command."""
    module, subcommand = module_of(command)
    with pytest.raises(SystemExit) as left:
        module.main([*subcommand, "--help"])
    assert left.value.code == 0, str(command)


def test_what_does_not_run_here_is_said_once_and_why() -> None:
    commands = [command for page in PAGES for command in shown(page)]
    assert len(commands) > 120
    unused = set(ELSEWHERE) - {elsewhere(command) for command in commands}
    assert not unused, "no page shows these any more"
    programs = {command.program for command in commands} | {f"{c.program} {c.arguments[:1]}" for c in commands}
    assert not {name for name in OTHERS if name.split()[0] not in programs}
    for reason in (*ELSEWHERE.values(), *OTHERS.values()):
        for place in re.findall(r"tests/[\w/.]+", reason):
            assert (ROOT / place).exists(), place
    ours = {command.program for command in commands} - set(OTHERS) - {"torchrun"}
    assert all(re.match(r"(megavar|launchers|tools)\b", program) for program in ours), ours


def test_python_that_is_shown(workshop: Workshop, said: dict[object, str]) -> None:
    lines = [code for code in inline(README) if code.startswith("model")]
    assert len(lines) == 2 and (workshop.folder / "runs/stmoe-d16").exists()
    for code in ["\n".join(["import megavar", *lines]), *blocks(ROOT / "docs/checkpoints.md", "python")]:
        workshop.execute(code)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_yaml_that_is_shown_decodes(page: Path, workshop: Workshop, tmp_path: Path) -> None:
    import yaml

    from launchers.slurm import load_cluster

    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        file = tmp_path / "shown.yaml"
        if "notify" in tree:
            file.write_text(f"partition: gpu\n{text}")
            assert load_cluster(str(file)).notify is not None
        elif "plugins" not in tree:  # tests/boundary has plugins
            file.write_text(yaml.safe_dump({"base": str(ROOT / "configs/mepa/stmoe_d16.yaml")} | tree))
            load_config(file, ["train.global_batch_size=64"])
