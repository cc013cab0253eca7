"""The comparison with the public VAR code refuses what is no checkout of it, and models that it does not have."""

import pytest

from megavar.errors import ExitCode
from tools import benchmark_against


@pytest.mark.parametrize(
    ("config", "told"),
    [("var_d16", "is no checkout of FoundationVision/VAR"), ("stmoe_d16", "has dense VARs only")],
)
def test_what_cannot_be_compared_is_refused(config, told, tmp_path, capsys):
    code = benchmark_against.main([str(tmp_path), f"configs/mepa/{config}.yaml", "train.precision=fp32"])
    assert code != ExitCode.FINISHED
    assert told in capsys.readouterr().err
