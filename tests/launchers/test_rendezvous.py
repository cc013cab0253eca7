"""The address and port at which ranks meet."""

import socket

import pytest

from launchers.rendezvous import FIRST_PORT, OVERRIDE, PORTS, RendezvousError, main, master_address, master_port, run
from megavar.errors import ExitCode

JOB = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def commands(resolved: dict[str, str], node_address: str):
    """Answers as getent and scontrol give them."""

    def answer(command: list[str]) -> str:
        match command:
            case ["scontrol", "show", "hostnames", "n[1-2]"]:
                return "n1\nn2\n"
            case ["scontrol", "show", "node", "n1"]:
                return f"NodeName=n1 Arch=x86_64\n   NodeAddr={node_address} NodeHostName=n1 Version=22.05.8\n"
            case ["getent", "ahostsv4", name]:
                return f"{resolved[name]}     STREAM {name}\n" if name in resolved else ""
        raise AssertionError(command)

    return answer


def test_the_override_wins():
    assert master_address({**JOB, OVERRIDE: "10.9.9.9"}, commands({"n1": "10.0.0.1"}, "10.0.0.2")) == "10.9.9.9"


def test_name_resolution_comes_next():
    assert master_address(JOB, commands({"n1": "10.0.0.1"}, "10.0.0.2")) == "10.0.0.1"


def test_slurms_address_where_names_do_not_resolve():
    assert master_address(JOB, commands({}, "10.0.0.2")) == "10.0.0.2"
    assert master_address(JOB, commands({"n1.cluster": "10.0.0.3"}, "n1.cluster")) == "10.0.0.3"


def test_debians_own_name_is_not_an_address_for_other_nodes():
    assert master_address(JOB, commands({"n1": "127.0.1.1"}, "10.0.0.2")) == "10.0.0.2"
    assert master_address({**JOB, "SLURM_JOB_NUM_NODES": "1"}, commands({"n1": "127.0.1.1"}, "n1")) == "127.0.1.1"


def test_the_error_names_all_three():
    with pytest.raises(RendezvousError, match=r"(?s)MEGAVAR_MASTER_ADDR.*getent ahostsv4 n1.*NodeAddr=n1"):
        master_address(JOB, commands({}, "n1"))


def test_absent_and_failing_commands_give_nothing():
    assert run(["no-such-command"]) == ""
    assert run(["false"]) == ""


def test_ports_stay_below_the_ephemeral_range():
    for job in (1, 9999, 10000, 123456789, 2**31 - 1):
        assert FIRST_PORT <= master_port(job) < FIRST_PORT + PORTS < 32768


def test_an_occupied_port_is_passed_over():
    job = 4321
    port = master_port(job)
    with socket.socket() as other:
        other.bind(("", port))
        other.listen(1)
        second = master_port(job)
    assert second != port
    assert FIRST_PORT <= second < FIRST_PORT + PORTS


def test_empty_variables_of_slurm_are_absent_ones(monkeypatch, capsys):
    empty = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "", OVERRIDE: " "}
    assert master_address(empty, commands({"n1": "127.0.1.1"}, "")) == "127.0.1.1"
    monkeypatch.setenv("SLURM_JOB_ID", "")
    assert main() == ExitCode.PREFLIGHT
    assert "this is no job of Slurm" in capsys.readouterr().err
