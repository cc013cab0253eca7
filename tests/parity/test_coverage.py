"""No golden vector is left untested: a family or case without a test fails, one not built is skipped by name."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .cases import Case, Family, cases, parity_directory
from .not_built import NOT_BUILT

for file in sorted(Path(__file__).parent.glob("test_*.py")):
    if file.stem != Path(__file__).stem:
        importlib.import_module(f"{__package__}.{file.stem}")


def families_in(directory: Path) -> list[str]:
    found = [path for path in directory.glob("*") if path.is_dir() and not path.name.startswith(".")]
    return sorted(path.name for path in found)


def waiting(family: str, directory: Path) -> list[str]:
    """What is not built yet of a family, with its cases; AssertionError if any other case has no test."""
    found = cases(family, directory)
    orphans = {path.stem for path in (directory / family).iterdir()} - {case.path.stem for case in found}
    assert found and not orphans, f"{directory / family}: no description (.json) of {sorted(orphans) or 'any case'}"
    built = [declared for declared in Family.built if declared.name == family]
    reasons = {case: NOT_BUILT.get(case.name, NOT_BUILT.get(family)) for case in found}
    if not built:
        assert all(reasons.values()), (
            f"{directory / family}: no test knows the family {family!r}. Compare its cases (tests/parity/cases.py says "
            f"how), or say in tests/parity/not_built.py what they wait for."
        )
        return by_reason(reasons)
    assert family not in NOT_BUILT, f"{family} is built: take it off tests/parity/not_built.py"
    claimed = {case: [declared for declared in built if declared.claims_of(case)] for case in found}
    untested = [case.name for case in found if not claimed[case] and not reasons[case]]
    assert not untested, f"no test reads the cases {untested} of the built family {family!r}"
    late = [case.name for case in found if claimed[case] and reasons[case]]
    assert not late, f"{late} are built: take them off tests/parity/not_built.py"
    shared = [case.name for case in found if len(claimed[case]) > 1]
    assert not shared, f"the tests of one case belong into one file: {shared}"
    return by_reason(reasons)


def by_reason(reasons: dict[Case, str | None]) -> list[str]:
    found = {reason: [case.name for case, why in reasons.items() if why == reason] for reason in reasons.values()}
    return [f"{reason} ({', '.join(names)})" for reason, names in found.items() if reason]


@pytest.mark.parametrize("family", families_in(parity_directory()))
def test_every_case_is_compared(family: str) -> None:
    left = waiting(family, parity_directory())
    if left:
        pytest.skip(f"{family} is not built yet: " + ", ".join(left))


def test_the_directory_has_families() -> None:
    assert families_in(parity_directory()), f"{parity_directory()} (MEGAVAR_PARITY) has no folders of families"


def write(folder: Path, name: str, config: dict, **tensors: torch.Tensor) -> Path:
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": config}))
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("var_transformer", "no test reads the cases .*var_transformer/new"),
        ("unheard_of", "no test knows the family 'unheard_of'"),
    ],
)
def test_a_case_that_nobody_reads_is_found(tmp_path: Path, family: str, sentence: str) -> None:
    write(tmp_path, f"{family}/new", {"unheard_of": 1}, a=torch.zeros(1))
    with pytest.raises(AssertionError, match=sentence):
        waiting(family, tmp_path)


def test_what_is_not_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOT_BUILT, "unheard_of", "a network")
    write(tmp_path, "unheard_of/new", {}, a=torch.zeros(1))
    assert waiting("unheard_of", tmp_path) == ["a network (unheard_of/new)"]


def test_everything_of_a_case_that_is_left_out_is_found(tmp_path: Path) -> None:
    config = {"a": 1, "inner": {"b": 2, "c": 3}, "absent": None, "peer_rule": "d", "published": {"e": 4}}
    names = ("input.x", "input.y", "output.p", "output.q.0", "grad_norm.w", "weights.w")
    case = Case(write(tmp_path, "some/case", config, **{name: torch.ones(1) for name in names}))
    everything = ["config key a", "config key inner.b", "config key inner.c", "input.x", "input.y"]
    everything += ["grad_norm.w", "output.p", "output.q.0"]
    assert case.left_out({}) == everything
    assert case.config["a"] == 1 and case.config["inner"]["c"] == 3
    case.check("output.p", case["input.x"])
    case.check_series("output.q", [torch.ones(1)])
    assert case.left_out({}) == ["config key inner.b", "input.y", "grad_norm.w"]
    assert case.left_out({"input.*": "", "inner.b": "", "grad_norm.*": ""}) == []
