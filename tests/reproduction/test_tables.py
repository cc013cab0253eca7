"""Tables of papers as data: every row resolves, equal runs are one run, and the text shows what the file says."""

from collections import defaultdict
from pathlib import Path

import pytest

from megavar.config.table import TableConfig, load_table
from megavar.errors import ConfigError
from megavar.training.run_directory import identity_of

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "configs/tables").rglob("*.yaml") if not path.name.startswith("base"))
TABLES = [load_table(path) for path in FILES]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_row_resolves(table):
    for row in table.trained:
        config = table.config_of(row)
        assert config.run.name == row.run
        assert config.data.image_size == config.tokenizer.space.image_side
    for row in table.demo.rows if table.demo else ():
        table.demo_config(row, seed=1)


def test_one_run_has_one_name_in_all_tables():
    names, identities = defaultdict(set), defaultdict(set)
    for table in TABLES:
        for row in table.trained:
            identity = identity_of(table.config_of(row))
            names[identity].add(row.run)
            identities[row.run].add(identity)
    assert {identity: found for identity, found in names.items() if len(found) > 1} == {}
    assert {name for name, found in identities.items() if len(found) > 1} == set()


MINIMAL = """
name: t
source: a paper
title: t
protocol: p
metrics: {fid: {heading: FID, better: lower}}
rows: [{name: a, paper: {fid: 1.0}}, {name: b, config: configs/mepa/var_d16.yaml, run: b}]
"""


@pytest.mark.parametrize(("before", "after", "message"), [
    ("fid: 1.0", "fidd: 1.0", "value of 'fidd'"),
    ("name: b,", "name: a,", "two rows are called 'a'"),
    (", run: b", "", "needs both config and run"),
    ("title: t", "title: t\nbaseline: c", "'c' is no row"),
    ("heading: FID", "headng: FID", "Did you mean 'heading'"),
])  # fmt: skip
def test_slips_are_named(tmp_path, before, after, message):
    path = tmp_path / "table.yaml"
    path.write_text(MINIMAL.replace(before, after))
    with pytest.raises(ConfigError, match=message):
        load_table(path)


def test_rows_say_what_cannot_be_trained(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(MINIMAL.replace("run: b}", "run: b, overrides: [generator.dept=3]}"))
    table: TableConfig = load_table(path)
    with pytest.raises(ConfigError, match="quoted from elsewhere"):
        table.row("a")
    with pytest.raises(ConfigError, match=r"t has no row 'c'\. Rows that are runs: b"):
        table.row("c")
    with pytest.raises(ConfigError, match=r"t, row 'b': .*Did you mean 'depth'"):
        table.config_of(table.row("b"))
