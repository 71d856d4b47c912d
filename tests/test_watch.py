"""``--watch``: who is answered what, and the report of a real search while it runs."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from browser import browser
from conftest import ROOT

from meme.errors import UserError
from meme_nas.report.live import Watch


def ask(address, path="/", host=None):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_page_is_made_once_a_version_and_only_when_it_is_asked_for():
    made, version = [], [0]

    def page():
        made.append(version[0])
        return f"page {version[0]}"

    with Watch(page, lambda: version[0]) as watch:
        assert made == []
        assert [ask(watch.address) for _ in range(2)] == [(200, "page 0")] * 2
        version[0] = 3
        assert ask(watch.address, "/version") == (200, "3")
        assert ask(watch.address) == (200, "page 3")
        assert made == [0, 3]
        status, library = ask(watch.address, "/plotly.js")
        assert status == 200 and "plotly.js v" in library
    with pytest.raises(OSError):
        ask(watch.address)


def test_it_listens_on_this_machine_alone_and_answers_its_own_names_only():
    with Watch(lambda: "page", lambda: 0) as watch:
        assert urlsplit(watch.address).hostname == "127.0.0.1"
        assert ask(watch.address, host="localhost:8080")[0] == 200  # as a forwarded port has it
        assert ask(watch.address, host="elsewhere.example")[0] == 403
        assert ask(watch.address, "/../run_search.py")[0] == 404


def test_what_fails_is_the_browsers_answer_and_a_taken_port_a_sentence():
    def page():
        raise RuntimeError("<b>no page</b>")

    with Watch(page, lambda: 0) as watch:
        status, said = ask(watch.address)
        assert status == 500 and "RuntimeError" in said and "<b>" not in said
        assert ask(watch.address, "/version")[0] == 200
        with pytest.raises(UserError, match="watch_port"):
            Watch(page, lambda: 0, urlsplit(watch.address).port)


@pytest.mark.slow
def test_a_search_is_watched_while_it_runs(tmp_path):
    """A browser that follows sees trials come; the end of the search ends the server."""
    small = "--engine local --workers 1 --strategy joint --features random"
    small += " --proxy-steps 2 --samples 16 --budget 4 --audit-factor 0 --trunk-share 0 --p-share 0 --confirm-share 0 --watch"
    command = [sys.executable, "run_search.py", *small.split(), "--study", str(tmp_path / "study")]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    search = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in search.stdout if (found := re.search(r"http://127.0.0.1:\d+/", line)))
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert "MEME search: digits-meme" in answer.read().decode()
        with browser(tmp_path / "profile") as tab:
            tab.open(address)
            tab.wait_for("document.querySelectorAll('.trials tr.complete').length > 0", seconds=90)  # the page reloads itself
            tab.wait_for("document.querySelectorAll('.film').length > 0 && document.querySelector('#spectra')", seconds=90)
            assert tab.complaints == []
        assert json.loads(ask(address, "/version")[1]) >= 1
        search.communicate(timeout=180)
    finally:
        search.kill()
    assert search.returncode == 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(address, timeout=5)
    report = (tmp_path / "study" / "report.html").read_text()
    assert "data-live" not in report.partition("<script")[0] and "Plotly.react" in report


def test_closing_is_quick_though_a_browser_holds_on():
    with Watch(lambda: "page", lambda: 0) as watch:
        held = http.client.HTTPConnection(urlsplit(watch.address).netloc)
        held.request("GET", "/version")
        held.getresponse().read()
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    held.close()
