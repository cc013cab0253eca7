"""``megavar reproduce``: what it shows, and what it hands to the Slurm launcher."""

import re
import shutil
from pathlib import Path

import pytest

from megavar.__main__ import main
from megavar.config.table import load_table
from megavar.errors import ExitCode
from megavar.planning.plan import plan

ROOT = Path(__file__).parents[2]
TABLE = "configs/tables/mepa/table4.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_costs_are_those_of_the_plan(capsys, tmp_path):
    """And dense networks of as many active FLOPs as experts are stated."""
    ledger = str(tmp_path / "ledger.jsonl")
    assert main(["reproduce", TABLE, "--on", "8xh200", "--hours", "12", "--ledger", ledger]) == ExitCode.FINISHED
    text = capsys.readouterr().out
    assert re.search(r"VAR +4\.10 +8\.75 +241\.6 +0\.85 +0\.47", text)
    table = load_table(TABLE)
    rows = {name: re.search(rf"^  {re.escape(name)}  .*\d$", text.split("COSTS")[1], re.M)[0].split()[-9:]
            for name in ("VAR", "+STMoE", "VAR, equal active FLOPs")}  # fmt: skip
    config = table.config_of(table.row("VAR"))
    predicted = plan(config, 8, "h200", images=table.images, job_seconds=12 * 3600, suggestions=0)
    assert predicted.fits
    assert float(rows["VAR"][4]) == round(predicted.seconds / 3600 * 8)
    assert (rows["VAR"][3], int(rows["VAR"][-1])) == ("1.00", predicted.links)
    active, flops = float(rows["+STMoE"][1]), float(rows["+STMoE"][2])
    assert flops == pytest.approx(float(rows["VAR, equal active FLOPs"][2]), rel=0.002)
    assert active == pytest.approx(float(rows["VAR, equal active FLOPs"][1]), rel=0.002)


def test_rows_are_handed_to_the_launcher(capfd, tmp_path):
    """Dry: the batch script of one row, with the user's overrides."""
    shutil.copy("slurm/cluster.example.yaml", tmp_path / "cluster.yaml")
    options = f"--dry-run --cluster {tmp_path / 'cluster.yaml'}"
    shared = "run.directory=/shared/runs/stmoe-d16-100ep"  # a checkout in /tmp would be refused
    code = main(["reproduce", TABLE, "--nodes", "2", "--slurm", options, "--submit", "+STMoE", "train.seed=7", shared])
    out, err = capfd.readouterr()
    assert code == ExitCode.FINISHED, err
    assert "submit configs/mepa/stmoe_d16.yaml run.name=stmoe-d16-100ep" in out and "train.seed=7" in out
    assert re.search(r"#SBATCH --nodes=2", out) and "runs/stmoe-d16-100ep" in out


def test_a_row_that_does_not_exist_submits_nothing(capsys):
    assert main(["reproduce", TABLE, "--submit", "+STMo"]) == ExitCode.CONFIGURATION
    assert "has no row '+STMo'" in capsys.readouterr().err
