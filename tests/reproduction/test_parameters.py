"""Parameters of rows are those that papers print, with the heads of terms; where they are not, the row says why."""

from pathlib import Path

import pytest

from megavar.config.table import load_table
from megavar.planning.measure import Request, measure
from megavar.planning.workload import count_parameters

ROOT = Path(__file__).parents[2]
TABLES = [load_table(path) for path in sorted((ROOT / "configs/tables").rglob("*.yaml")) if "base" not in path.name]
ROWS = {row.run: (table, row) for table in TABLES for row in table.trained if row.paper_parameters is not None}


def test_there_is_something_to_compare():
    assert len(ROWS) >= 6


@pytest.mark.parametrize("run", sorted(ROWS))
def test_parameters_are_those_of_the_paper(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    table, row = ROWS[run]
    config = table.config_of(row)
    (cost,) = measure([Request(config.generator, config.tokenizer.space, terms=config.recipe.counted_terms)])
    activated = count_parameters(config.generator, config.tokenizer.space, cost).activated
    agrees = abs(activated / 1e6 - row.paper_parameters) <= 0.5
    assert agrees == row.parameters_agree, f"{activated / 1e6:.2f} M, printed: {row.paper_parameters} M"
