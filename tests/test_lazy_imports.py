"""Optional packages are imported where they are needed, and not before: they take seconds and may be missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_assembly_imports_no_optional_package() -> None:
    script = (
        "import sys, megavar.assembly, megavar.generators.language_model.published\n"
        "print(sorted({'transformers', 'diffusers', 'timm'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"


def test_optional_packages_are_those_that_tests_run_with() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert extras and all(package in pinned for packages in extras.values() for package in packages)
