"""``megavar report``: all that was written down is on the page, the page needs nothing else, tables say the numbers."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megavar.__main__ import main
from megavar.errors import ExitCode
from megavar.reporting.cost import cost_of
from megavar.reporting.facts import RunFacts
from tests.reporting.written_runs import write_run


class Addresses(HTMLParser):
    """What a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        assert tag != "script"


def loads_nothing(page: str) -> bool:
    parser = Addresses()
    parser.feed(page)
    inside = all(address.startswith(("data:", "#")) for address in parser.found)
    return inside and not re.search(r"url\((?!#)|@import", page)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "fast", slope=0.03, restart=True, scores={"fid": 4.0, "fd_x": 7.0}),
        write_run(folder / "slow", scores={"fid": 4.5, "fd_x": 3.0}),
    ]


def test_one_run_with_a_restart(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[0]), "--out", str(tmp_path)]) == ExitCode.FINISHED
    assert "misses fd_x" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert loads_nothing(page) and len(page) < 3e6
    for text in ("finished at step 100 of 100; misses fd_x", "Vertical lines: restart, spike", "disk is &lt;full&gt;",
                 "cat, &lt;dog&gt;", "git checkout c0ffee", "4 x Some GPU", "noise_1", "Attempts of fast"):  # fmt: skip
        assert text in page, text
    assert page.count('src="data:image/') == 3  # the newest preview as the first picture, and both over time
    names = set(re.findall(r'figure id="figure-([^"]+)"', page))
    assert {"loss", "validation", "scales", "experts", "routing", "speed"} <= names
    assert {path.stem for path in (tmp_path / "figures").glob("*.pdf")} == names
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(set(clips)) == len(clips)  # a figure's clip paths must not cut another's


def test_cost_counts_devices_states_and_what_was_lost(runs: list[Path]) -> None:
    fast, slow = (cost_of(facts) for facts in RunFacts.read(runs))
    assert (fast.devices, fast.starts, fast.lost_steps) == (4, 2, 10)
    assert slow.hours["training"] == pytest.approx(4 * 90 / 3600) and slow.lost_steps == 0
    assert fast.hours["repeated"] == pytest.approx(4 * 10 / 3600)  # from step 50 to 60, done again
    assert fast.planned_hours == pytest.approx(4 * 100 * 0.5 / 3600)
    assert fast.measured["step_seconds"] == 1.0 and fast.expected["step_seconds"] == 0.5


def test_several_runs_with_a_reference(runs: list[Path], tmp_path: Path) -> None:
    band = tmp_path / "band.json"
    band.write_text('{"name": "three seeds", "metric": "loss", "steps": [1, 100], "mean": [4, 3], "low": [3.9, 2.9], '
                    '"high": [4.1, 3.1]}')  # fmt: skip
    assert main(["report", *map(str, runs), "--out", str(tmp_path), "--reference", str(band)]) == ExitCode.FINISHED
    page = (tmp_path / "report.html").read_text()
    assert loads_nothing(page) and "three seeds" in page and "fast, slow" in page
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    found = {(row["run"], row["row"], row["metric"]): (float(row["value"]), row["met"]) for row in rows}
    assert found["fast", "fast", "fd_x"] == (7.0, "no") and found["slow", "slow", "fd_x"] == (3.0, "yes")
    assert found["slow", "noise_1", "fid"] == (50.0, "no") and len(rows) == 8
    table = (tmp_path / "table.tex").read_text()
    assert r"fast & \textbf{4.000} & 7.000 \\" in table and r"slow & 4.500 & \textbf{3.000} \\" in table
    assert r"noise\_1 & 50.0" in table and r"fd\_x $\downarrow$" in table


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("run: {name: new}\ntrain: {steps: 10, global_batch_size: 4}\n")
    assert main(["report", str(run)]) == ExitCode.FINISHED
    page = (run / "report/report.html").read_text()
    assert "new at step 0 of 10" in page and "Nothing was logged yet" in page and "Not scored yet" in page


def test_what_is_no_run_and_no_curve_is_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == ExitCode.CONFIGURATION
    assert "is no run" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[1]")
    assert main(["report", str(runs[0]), "--reference", str(tmp_path / "x.json")]) == ExitCode.CONFIGURATION
    assert "is no reference curve" in capsys.readouterr().err
