"""``megavar reproduce``: a paper's table, its rows' costs and our values; submits, demonstrates and collects them."""

import argparse
import shlex
import subprocess
import sys

from megavar.config.root import Config
from megavar.config.table import TableConfig, load_table
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.paths import as_path
from megavar.planning.efficiency import flops_per_image
from megavar.planning.plan import Plan
from megavar.reproduction import demo, ledger, listing
from megavar.reproduction.costs import MACHINES, Machine, cost
from megavar.storage import write_json_atomic

SUBJECT = ("TABLE", "YAML file of the table (configs/tables)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the table."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--submit", nargs="*", metavar="ROW", help="submit these rows, or all, through launchers.slurm")
    action.add_argument("--demo", action="store_true", help="train the rows at a small size here, or continue")
    action.add_argument("--collect", action="store_true", help="add finished runs to the ledger")
    parser.add_argument("--seeds", type=int, help="of a demo (default: the table's)")
    parser.add_argument("--folder", type=as_path, default=demo.FOLDER, help=f"of a demo's runs ({demo.FOLDER})")
    parser.add_argument("--on", action="append", metavar="NUMBERxGPU", help="predict costs for (8xh200, 32xa100)")
    parser.add_argument("--hours", type=float, default=24.0, help="time limit of one job, for the length of its chain")
    parser.add_argument("--no-costs", action="store_true", help="show values only, at once")
    parser.add_argument("--nodes", type=int, default=1, help="of a submitted job (default: 1)")
    parser.add_argument("--slurm", default="", metavar="OPTIONS", help='e.g. "--dry-run --time 8:00:00"')
    parser.add_argument("--ledger", type=as_path, default=ledger.LEDGER, help=f"default: {ledger.LEDGER}")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    words = options.submit or []
    options.overrides += [word for word in words if "=" in word]  # they may follow the rows
    table = load_table(options.config)
    if options.submit is not None:
        return submit(table, [word for word in words if "=" not in word], options)
    if options.collect:
        return collect(table, options)
    if options.demo:
        return demonstrate(table, options)
    return show(table, options)


def show(table: TableConfig, options: argparse.Namespace) -> ExitCode:
    """Values, costs, remarks, and how to go on."""
    entries = ledger.read(options.ledger)
    configs = {row.name: table.config_of(row, options.overrides) for row in table.trained}
    found = {row.name: ledger.entry_of(entries, table, row, configs[row.name]) for row in table.trained}
    print(listing.format_head(table), listing.format_values(table, found), sep="\n\n", flush=True)
    if configs and not options.no_costs:
        machines = [Machine.parse(text) for text in options.on] if options.on else list(MACHINES)
        costs = {name: _costs(config, machines, table, options.hours, f"{number} of {len(configs)}")
                 for number, (name, config) in enumerate(configs.items(), 1)}  # fmt: skip
        print(f"\n{listing.format_costs(table, costs, options.hours)}")
    for text in (listing.format_remarks(table), listing.format_commands(table, options.config)):
        if text:
            print(f"\n{text}")
    return ExitCode.FINISHED


def _costs(
    config: Config, machines: list[Machine], table: TableConfig, hours: float, place: str
) -> dict[Machine, Plan]:
    if sys.stderr.isatty():
        print(f"\rmeasuring the model of row {place}", end="", file=sys.stderr, flush=True)
    return {machine: cost(config, machine, table.images, hours * 3600) for machine in machines}


def submit(table: TableConfig, names: list[str], options: argparse.Namespace) -> ExitCode:
    """Submit rows with the launcher's own command line, each run once."""
    rows = [table.row(name) for name in names] or list(table.trained)
    once = {row.run: row for row in rows}
    for row in once.values():
        table.config_of(row, options.overrides)  # refuse all before one is submitted
    for row in once.values():
        words = ["submit", *table.words(row, options.overrides), "--nodes", str(options.nodes)]
        words += shlex.split(options.slurm)
        print(f"{row.name}: python -m launchers.slurm {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "launchers.slurm", *words], check=False).returncode
        if code != 0:
            return ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
    return ExitCode.FINISHED


def collect(table: TableConfig, options: argparse.Namespace) -> ExitCode:
    """Read finished runs into the ledger."""
    added = ledger.collect(table, options.overrides, options.ledger)
    for entry in added:
        values = ", ".join(f"{name} {value:.4g}" for name, value in entry.metrics.items())
        print(f"{entry.row}: {values} ({entry.gpu_hours:.1f} GPU hours on {entry.ranks} x {entry.device})")
    print(f"{len(added)} new entries in {options.ledger}")
    return ExitCode.FINISHED


def demonstrate(table: TableConfig, options: argparse.Namespace) -> ExitCode:
    """Train the rows at a small size, then compare; a demo that was interrupted continues."""
    from megavar.commands.analyze import look
    from megavar.commands.train import train  # DeepSpeed: not for a listing

    runs = demo.demo_runs(table, options.seeds or table.require_demo().seeds, options.overrides, options.folder)
    place = environment()

    def train_and_look(config: Config) -> ExitCode:
        code = train(config, place)
        for words in table.require_demo().analyses if code == ExitCode.FINISHED else ():
            look(config, words.split(), place)
        return code

    code = demo.train_all(table, runs, train_and_look)
    topology.shutdown()
    result = demo.summary(table, runs)
    flops = {run.row: flops_per_image(run.config) for run in runs if run.seed == 0}
    result["flops_per_image"] = flops
    write_json_atomic(options.folder / f"{table.name}.json", result)
    found = demo.means(table, runs)
    print(f"\n{listing.format_demo(table, found, flops, result['verdicts'], result['processor_minutes'])}")
    if code != ExitCode.FINISHED:
        print("stopped: the same command continues")
    return code
