"""What looks like a credential: the one rule for everything that writes environment variables down."""

import re

_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|WEBHOOK|SIGNATURE|BEARER|NETRC|"
    r"(?:^|_)(?:AUTH|AUTHORIZATION|PASS|PWD|PW|PIN|DSN|SAS|JWT|LOGIN)(?:_|$)",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"://[^/\s@]*:[^/\s@]+@"  # user and password of a URL, as in the variables of proxies
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|sk-|AKIA|ASIA|eyJ)[A-Za-z0-9_-]{10,}"
)
"""Well-known shapes: tokens of Hugging Face, GitHub, GitLab, Slack, OpenAI, AWS, and JSON web tokens."""


def looks_secret(name: str, value: str = "") -> bool:
    """Whether the environment variable ``name`` may hold a credential and must not be recorded."""
    return (_NAME.search(name) is not None and name != "PWD") or _VALUE.search(value) is not None
