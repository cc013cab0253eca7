"""Optional packages are imported where they are needed, and not before: they take seconds and may be missing."""

import subprocess
import sys


def test_assembly_imports_no_optional_package() -> None:
    script = (
        "import sys, megavar.assembly, megavar.generators.language_model.published\n"
        "print(sorted({'transformers', 'diffusers', 'timm'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"
