"""The programs that docs/watching.md shows for ``notify`` and for Prometheus, as printed; stand-ins for the world."""

import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavar.__main__ import main
from megavar.errors import ExitCode
from megavar.notify import VARIABLE, notify
from tests.commands.test_status import write_run
from tests.docs.commands import ROOT, blocks

SCRIPTS = [text for text in blocks(ROOT / "docs/watching.md", "bash") if text.startswith("#!/bin/sh")]
MESSAGE = 'the next checkpoint needs 2.1 GB, and "1.3 GB" are free'


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program goes; HOME and PATH are the test's."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv(VARIABLE, json.dumps({"command": [str(tmp_path / "tell")], "on": ["disk"]}))
    return tmp_path / "tell"


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def of(name: str) -> str:
    (script,) = [text for text in SCRIPTS if name in text.splitlines()[1]]
    return script


def test_e_mail(tell: Path) -> None:
    write(tell, of("E-mail"))
    write(tell.parent / "bin/sendmail", '#!/bin/sh\necho "$@" > "$HOME/to"; cat > "$HOME/mail"\n')
    assert notify("photos", "/runs/photos", "disk", MESSAGE)
    assert (tell.parent / "to").read_text() == "me@example.org\n"
    assert (tell.parent / "mail").read_text() == f"Subject: photos: disk\n\n{MESSAGE}\n"


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[tuple[str, dict]]]]:
    """A server on this machine, and what was posted to it: path and JSON."""
    posted: list[tuple[str, dict]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/services/T0/B0/secret", posted
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_slack(tell: Path, webhook: tuple[str, list]) -> None:
    address, posted = webhook
    write(tell, of("Slack"))
    (tell.parent / ".slack-webhook").write_text(f"{address}\n")
    assert notify("photos", "/runs/photos", "disk", MESSAGE)
    assert posted == [("/services/T0/B0/secret", {"text": f"*photos* {MESSAGE}"})]


def test_every_program_of_the_page_is_tested() -> None:
    assert len(SCRIPTS) == 2
    assert set(json.loads(blocks(ROOT / "docs/watching.md", "json")[0].replace("\n", ""))) == {
        "run", "directory", "kind", "message", "time", "host", "job", "step"}  # fmt: skip


def test_prometheus(tmp_path: Path) -> None:
    """The names on which the page says to alert are in the file."""
    page = (ROOT / "docs/watching.md").read_text()
    run = write_run(tmp_path / "photos", steps=3, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        alert = {"event": "alert", "kind": "disk", "message": MESSAGE, "step": 3, "time": 4.0}
        file.write(json.dumps(alert) + "\n")
    assert main(["status", str(run), "--prometheus", str(tmp_path / "megavar.prom")]) == ExitCode.FINISHED
    text = (tmp_path / "megavar.prom").read_text()
    for name in ("megavar_alert", "megavar_state"):
        assert f"{name}{{" in text and name in page, text
    assert 'state="' in text
