"""Packages, and the files that come with them: configurations and batch scripts lie in the package once installed."""

from setuptools import find_packages, setup

SHIPPED = {"megavar.configs": "configs", "megavar.slurm": "slurm"}

setup(
    packages=[*find_packages(include=["megavar*", "launchers*", "tools*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={name: ["**/*.yaml", "**/*.json", "**/*.sbatch", "**/*.bash"] for name in SHIPPED}
    | {"megavar.reporting": ["*.html"]},
)
