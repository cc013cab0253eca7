"""What README and pages say is there: every key, every command, every link."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megavar import __main__ as command_line
from megavar.config.loading import load_config
from tests.docs.commands import PAGES, ROOT, commands, module_and_arguments

RUN_BY = {
    "megavar train": "tests/end_to_end/test_runs.py",
    "megavar init": "tests/end_to_end/test_photographs.py",
    "megavar status": "tests/end_to_end/test_photographs.py",
    "megavar sample": "tests/end_to_end/test_photographs.py",
    "megavar report": "tests/end_to_end/test_photographs.py",
    "megavar fork": "tests/end_to_end/test_photographs.py",
    "megavar compare": "tests/end_to_end/test_photographs.py",
    "megavar evaluate": "tests/end_to_end/test_raster.py",
    "megavar plan": "tests/planning/test_plan.py",
    "megavar reproduce": "tests/reproduction/test_command.py",
    "megavar analyze": "tests/end_to_end/test_analyses.py",
    "launchers.slurm": "tests/launchers/test_slurm.py",
    "launchers.doctor": "tests/launchers/test_doctor.py",
    "launchers.preflight": "tests/launchers/test_preflight.py",
    "launchers.local": "tests/launchers/test_local.py",
    "tools.shard_images": "tests/tools/test_shard_images.py",
    "tools.verify_shards": "tests/sources/test_shard_verification.py",
    "tools.cache_tokens": "tests/tools/test_cache_tokens.py",
    "tools.evaluate_fid": "tests/tools/test_evaluate_fid.py",
    "tools.convert_checkpoint": "tests/tools/test_convert_checkpoint.py",
    "tools.benchmark": "tests/tools/test_benchmark.py",
    "tools.benchmark_recipes": "tests/tools/test_benchmark_recipes.py",
    "tools.gpu_check": "tests/tools/test_gpu_check.py",
    "tools.reference_curve": "tests/tools/test_reference_curve.py",
    "tools.small_vlm": "tests/end_to_end/test_vgt.py",
    "tools.configuration_reference": "tests/docs/test_pages.py",
}
"""Which test runs a command that is shown, at small size."""
NOT_RUN = {"venv", "pytest", "pip"}
"""CI runs these: an environment, its packages, the tests."""
SHOWN = [(page, words) for page in PAGES for words in commands(page)]


def test_the_configuration_reference_is_what_the_sections_say() -> None:
    """In a process of its own: others have plugins."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.configuration_reference", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_key_of_every_section_has_a_meaning() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)
    assert len(rows) > 400
    alone = re.compile(r"`[^`]+`")  # the only possible value: a kind's own name
    silent = {name for name, kind, _, meaning in rows if not meaning.strip() and not alone.fullmatch(kind)}
    assert not silent, f"these keys have no docstring: {sorted(silent)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            place, _, anchor = target.partition("#")
            assert (page.parent / place).exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (page.parent / place).read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}"


def test_every_command_that_is_shown_is_run_by_a_test() -> None:
    assert len(SHOWN) > 40
    for page, words in SHOWN:
        found = module_and_arguments(words)
        if found is None or found[0] in NOT_RUN:
            continue
        module, arguments = found
        name = f"{module} {arguments[0]}" if module == "megavar" else module
        assert name in RUN_BY, f"{page.name} shows {' '.join(words)!r}: name the test that runs it"
        text = (ROOT / RUN_BY[name]).read_text()
        assert name.split()[-1].split(".")[-1] in text, f"{RUN_BY[name]} does not run {name}"
        assert importlib.util.find_spec(module) is not None


def test_every_megavar_command_that_is_shown_is_understood() -> None:
    """Its options exist; a configuration that comes with megavar takes its overrides."""
    loaded = set()
    for page, words in SHOWN:
        found = module_and_arguments(words)
        if found is None or found[0] != "megavar":
            continue
        try:
            options = command_line.parse(found[1])
        except SystemExit:
            pytest.fail(f"{page.name}: {' '.join(words)} is refused")
        config = getattr(options, "config", "")
        key = (config, *getattr(options, "overrides", ()))
        if config.startswith("configs/") and "tables" not in config and key not in loaded:
            loaded.add(key)
            load_config(config, options.overrides)
    assert len(loaded) >= 4


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
