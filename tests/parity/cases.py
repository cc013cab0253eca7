"""Golden vectors of public reference implementations: discovery, loading and comparison.

A case is ``<family>/<case>.json`` beside ``<family>/<case>.safetensors``; the format is described in
``tests/data/parity/README.md``. Cases are read from the directory in the environment variable ``MEGAVAR_PARITY``
(default: the copy in ``tests/data/parity``), so another vector set in the same format runs unchanged.

A new family is one file ``tests/parity/test_<family>.py`` (and its line leaves ``not_built.py``)::

    MOE = Family("moe", aside={"batch": "the inputs' shape says it"})

    @MOE.each_case(lambda case: "top_k" in case.config)          # tell cases apart by their config, not by their name
    def test_the_layer_equals_the_reference(case: Case) -> None:
        layer = build(top_k=case.config["top_k"], ...)           # every variant comes from the case's own config
        layer.load_state_dict(case.under("weights."))
        case.check("output.result", layer(case["input.hidden"]))

Nothing of a case can be left out by accident: ``test_coverage.py`` fails for a case that no test claims, and when the
tests of a case are through, ``conftest.py`` fails for every ``input.`` that none of them read, every ``output.`` and
gradient that none of them compared and every key of its ``config`` that none of them read. What is meant to be left out
is said, with the reason, in ``aside``. The tests of one case are in one file.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
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


class Options(dict[str, Any]):
    """A case's config, which remembers the keys that were read; keys of nested options are ``outer.inner``."""

    def __init__(self, values: Mapping[str, Any], read: set[str], prefix: str = "") -> None:
        super().__init__(
            {k: Options(v, read, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in values.items()}
        )
        self._read, self._prefix = read, prefix

    def __getitem__(self, key: str) -> Any:
        self._read.add(self._prefix + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def names(self) -> list[str]:
        """All keys with a value, those of nested options in their place."""
        found: list[str] = []
        for key, value in self.items():
            nested = isinstance(value, Options) and not key.startswith(("published", "peer"))
            found += value.names() if nested else [] if value is None else [self._prefix + key]
        return found


class Case:
    """One golden case. Tensors are loaded on first use; float16 storage becomes float32 (loss-free by construction)."""

    def __init__(self, json_path: Path) -> None:
        self.path = json_path
        self.name = f"{json_path.parent.name}/{json_path.stem}"
        self.description: dict[str, Any] = json.loads(json_path.read_text())
        self.options_read: set[str] = set()
        self.inputs_read: set[str] = set()
        self.compared: set[str] = set()
        self.config = Options(self.description["config"], self.options_read)

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
        self.inputs_read.add(name)
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with ``prefix``, keyed by the rest of the name (``under("weights.")``)."""
        return {name[len(prefix) :]: self[name] for name in self.tensors if name.startswith(prefix)}

    def left_out(self, aside: Mapping[str, str]) -> list[str]:
        """Inputs and options that were not read, and results that were not compared, but for the patterns ``aside``."""
        inputs = {name for name in self.tensors if name.startswith("input.")}
        results = {name for name in self.tensors if name.startswith(("output.", "grad.", "grad_norm."))}
        left = [f"config key {name}" for name in self.config.names() if name not in self.options_read]
        left += sorted(inputs - self.inputs_read) + sorted(results - self.compared)
        patterns = [*aside, "published*", "peer*"]
        return [name for name in left if not any(fnmatchcase(name.split()[-1], pattern) for pattern in patterns)]

    def series(self, name: str) -> list[Tensor]:
        """The list stored as ``<name>.0``, ``<name>.1``, ... (empty if there is none)."""
        items: list[Tensor] = []
        while f"{name}.{len(items)}" in self.tensors:
            items.append(self[f"{name}.{len(items)}"])
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
        self.compared.add(name)
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


@functools.cache
def cases(family: str, directory: Path | None = None) -> list[Case]:
    """All cases of a family, the same objects for every test."""
    return [Case(path) for path in sorted(((directory or parity_directory()) / family).glob("*.json"))]


class Family:
    """The cases of a family that one file of tests compares."""

    built: "list[Family]" = []  # noqa: RUF012
    """All that were declared."""

    def __init__(self, name: str, aside: Mapping[str, str] | None = None) -> None:
        """Declare it.

        Args:
            aside: what the tests leave out on purpose, and why: patterns of tensor names and config keys. Config keys
                that begin with "published" or "peer" describe the reference and are always left out.
        """
        self.name = name
        self.aside = dict(aside or {})
        self.module = ""
        self.claims: dict[str, Callable[[Case], bool]] = {}
        self.ran: set[tuple[str, str]] = set()
        Family.built.append(self)

    def each_case(self, accepts: Callable[[Case], bool] = lambda case: True) -> Callable[[Any], Any]:
        """Decorator: run a test with the argument ``case`` for every case that ``accepts``."""

        def decorate(test: Any) -> Any:
            self.module = test.__module__
            self.claims[test.__name__] = accepts
            found = [case for case in cases(self.name) if accepts(case)]
            return pytest.mark.parametrize("case", found, ids=[case.path.stem for case in found])(test)

        return decorate

    def claims_of(self, case: Case) -> set[tuple[str, str]]:
        """The tests that run with a case."""
        return {(test, case.name) for test, accepts in self.claims.items() if accepts(case)}

    def problems(self) -> list[str]:
        """What was left out of the cases whose tests have all been run."""
        through = [case for case in cases(self.name) if self.claims_of(case) and self.claims_of(case) <= self.ran]
        left = {case.name: case.left_out(self.aside) for case in through}
        return [f"{name}: no test reads or compares {', '.join(what)}" for name, what in left.items() if what]
