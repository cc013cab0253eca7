"""Golden vectors of public reference implementations: discovery, loading and comparison.

A case is ``<family>/<case>.json`` beside ``<family>/<case>.safetensors``; the format is described in
``tests/data/parity/README.md``. Cases are read from the directory in the environment variable ``MEGAVAR_PARITY``
(default: the copy in ``tests/data/parity``), so another vector set in the same format runs unchanged.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

RTOL_WITHOUT_ENTRY = 1e-5
"""Relative tolerance of tensors for which the json states no precision (README: "use a relative tolerance of 1e-5")."""
RELATIVE_TO_MAXIMUM = 5e-6
"""Share of a tensor's largest magnitude that is always tolerated."""


def parity_directory() -> Path:
    """The directory that holds the families."""
    default = Path(__file__).parent.parent / "data" / "parity"
    return Path(os.environ.get("MEGAVAR_PARITY") or default)


class Case:
    """One golden case. Tensors are loaded on first use; float16 storage becomes float32 (loss-free by construction)."""

    def __init__(self, json_path: Path) -> None:
        self.path = json_path
        self.name = f"{json_path.parent.name}/{json_path.stem}"
        self.description: dict[str, Any] = json.loads(json_path.read_text())
        self.config: dict[str, Any] = self.description["config"]

    def __repr__(self) -> str:
        return self.name

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its full name, for example ``output.idx.0``."""
        stored = load_file(self.path.with_suffix(".safetensors"))
        return {name: t.float() if t.dtype == torch.float16 else t for name, t in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with ``prefix``, keyed by the rest of the name (``under("weights.")``)."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def series(self, name: str) -> list[Tensor]:
        """The list stored as ``<name>.0``, ``<name>.1``, ... (empty if there is none)."""
        items: list[Tensor] = []
        while f"{name}.{len(items)}" in self.tensors:
            items.append(self.tensors[f"{name}.{len(items)}"])
        return items

    def tolerance(self, name: str) -> tuple[float, float]:
        """Absolute and relative tolerance of the stored tensor ``name``; (0, 0) for integers and booleans.

        With a precision entry: ``atol = max(100 * max_abs_diff_fp32_vs_fp64, 5e-6 * max_abs)``, no relative part.
        Without: 1e-5 relative, and 5e-6 of the maximum for elements near zero.
        """
        expected = self.tensors[name]
        if not expected.is_floating_point():
            return 0.0, 0.0
        maximum = _finite_maximum(expected)
        entry = self.description.get("precision", {}).get("per_tensor", {}).get(name)
        if entry is None or "max_abs_diff_fp32_vs_fp64" not in entry:
            return RELATIVE_TO_MAXIMUM * maximum, RTOL_WITHOUT_ENTRY
        atol = max(100 * entry["max_abs_diff_fp32_vs_fp64"], RELATIVE_TO_MAXIMUM * entry.get("max_abs", maximum))
        if entry.get("rounding_noise_only"):
            atol = max(atol, 1e-6)  # mathematically zero: noise of any kernel is fine, a real value is not
        return atol, 0.0

    def check(self, name: str, actual: Tensor) -> None:
        """Assert that ``actual`` equals the stored tensor: same shape, ids exactly, floats within tolerance."""
        expected = self.tensors[name]
        where = f"{self.name} {name}"
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{where}: shape {tuple(actual.shape)}, the reference has {tuple(expected.shape)}"
        )
        if not expected.is_floating_point():
            wrong = int((actual.detach().cpu() != expected).sum())
            assert wrong == 0, f"{where}: {wrong} of {expected.numel()} entries differ from the reference"
            return
        got, want = actual.detach().double().cpu(), expected.double()
        same_non_finite = torch.equal(got[~want.isfinite()], want[~want.isfinite()])
        assert same_non_finite and bool(got[want.isfinite()].isfinite().all()), f"{where}: non-finite entries differ"
        finite = want.isfinite()
        atol, rtol = self.tolerance(name)
        excess = ((got - want).abs() - atol - rtol * want.abs())[finite]
        if excess.numel() and float(excess.max()) > 0:
            difference = float((got - want).abs()[finite].max())
            raise AssertionError(
                f"{where}: difference {difference:.3g} exceeds atol {atol:.3g} + rtol {rtol:.0e};"
                f" largest reference magnitude {_finite_maximum(expected):.3g}, "
                f"{int((excess > 0).sum())} of {expected.numel()} entries outside"
            )

    def check_series(self, name: str, actual: list[Tensor]) -> None:
        """Assert that a list equals the stored ``<name>.0``, ``<name>.1``, ... (as many as are stored)."""
        stored = self.series(name)
        assert stored, f"{self.name}: nothing stored as {name}.0"
        assert len(actual) == len(stored), f"{self.name} {name}: {len(actual)} entries, the reference has {len(stored)}"
        for index, tensor in enumerate(actual):
            self.check(f"{name}.{index}", tensor)

    def check_gradients(self, parameters: Mapping[str, Tensor] | nn.Module, prefix: str = "grad_norm.") -> None:
        """Assert the L2 norm of ``.grad`` of every parameter for which the case stores one under ``prefix``.

        ``parameters`` maps the reference's names to parameters. Every stored norm must be found and every parameter
        that has a gradient must be stored.
        """
        named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else dict(parameters)
        stored = self.under(prefix)
        assert stored, f"{self.name}: no tensors under {prefix}"
        missing = sorted(stored.keys() - named.keys())
        assert not missing, f"{self.name}: gradients of unknown parameters {missing[:5]}"
        extra = sorted(name for name, p in named.items() if p.grad is not None and name not in stored)
        assert not extra, f"{self.name}: parameters with a gradient that the reference lacks {extra[:5]}"
        for name in stored:
            gradient = named[name].grad
            norm = torch.zeros(()) if gradient is None else torch.linalg.vector_norm(gradient.float())
            self.check(prefix + name, norm)


def _finite_maximum(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def cases(family: str, accepts: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """All cases of a family that ``accepts`` (a predicate on the description: use config keys, not case names)."""
    found = [Case(path) for path in sorted((parity_directory() / family).glob("*.json"))]
    return [case for case in found if accepts(case)]


def each_case(family: str, accepts: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Decorator: run a test with the argument ``case`` for every case of a family that ``accepts``."""
    found = cases(family, accepts)
    return pytest.mark.parametrize("case", found, ids=[case.path.stem for case in found])
