"""What looks like a credential: the one rule for everything that writes environment variables down."""

import re

_NAME = re.compile(
    r"KEY(?!BOARD)|TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|WEBHOOK|SIGNATURE|BEARER|NETRC|"
    r"(?:^|_)(?:AUTH|AUTHORIZATION|PASS|PWD|PW|PIN|DSN|SAS|JWT|LOGIN)(?:_|$)",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"://[^/\s@]*:[^/\s@]+@"  # user and password of a URL, as in the variables of proxies
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|sk-|AKIA|ASIA|eyJ)[A-Za-z0-9_-]{10,}"
)
"""Well-known shapes: tokens of Hugging Face, GitHub, GitLab, Slack, OpenAI, AWS, and JSON web tokens."""


_PLAIN = re.compile(r"0|1|true|false|yes|no|on|off", re.IGNORECASE)
_NUMBER = re.compile(r"\d{1,6}")
_SHORT_ONES = re.compile(r"PIN|PASS|PWD|PW", re.IGNORECASE)
_PLACE = re.compile(r"_(?:FILE|PATH|DIR|FOLDER)$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(?=\b([A-Za-z_][A-Za-z0-9_]*)=(\"[^\"]*\"|'[^']*'|[^\s;&|,]*))")


def looks_secret(name: str, value: str = "") -> bool:
    """Whether the environment variable ``name`` may hold a credential and must not be recorded."""
    if _VALUE.search(value):
        return True
    counts = _NUMBER.fullmatch(value) and not _SHORT_ONES.search(name)  # MAX_TOKENS=4096
    harmless = name == "PWD" or counts or _PLAIN.fullmatch(value) or _PLACE.search(name)
    return _NAME.search(name) is not None and not harmless


def secret_in(text: str) -> str | None:
    """What in a line of shell or in an option looks like a credential written out; None: nothing.

    A value that is looked up where the line runs (``$(cat FILE)``, ``$NAME``) is none.
    """
    if _VALUE.search(text):
        return "a value"
    for name, value in _ASSIGNMENT.findall(text):
        value = value.strip("\"'")
        if value and not value.startswith("$") and looks_secret(name, value):
            return name
    return None
