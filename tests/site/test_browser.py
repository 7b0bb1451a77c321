"""What a reader of the site sees in a browser: where links land, and what a search finds first."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

SCRIPT = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
FIRST = {
    "AGC": r"docs/api/strategies/adaptive_grad_clip\.html",
    "gradient clipping by norm": r"docs/api/strategies/clip_by_global_norm\.html",
    "FSDP": r"docs/many_devices\.html",
    "DP-SGD": r"docs/(api/)?per_example\.html",  # the reference, or the guide
    "NaN": r"docs/api/guards\.html",
    "max_grad_norm": r"docs/coming_from\.html",
}


class Handler(SimpleHTTPRequestHandler):
    """The files of the site, and one page more, which other tests must not find among them."""

    def __init__(self, *args, page: bytes, **kwargs):
        self.page = page
        super().__init__(*args, **kwargs)

    def do_GET(self):
        if self.path != "/probe":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module", params=[1280, 390], ids=["desktop", "phone"])
def found(request, built, tmp_path_factory) -> dict:
    """What the script finds in all pages, in one start of the browser; pages are 8 s old."""
    site = built / "html"
    files = [*site.glob("docs/**/*.html"), *site.glob("notebooks/*.html")]
    pages = sorted(
        file.relative_to(site).as_posix() for file in files if file.parent.name != "playground"
    )
    values = {"WIDTH": request.param, "PAGES": pages, "QUERIES": list(FIRST)}
    script = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    page = f"<!doctype html><meta charset=utf-8><body><script>{script}{SCRIPT}</script>".encode()
    handler = functools.partial(Handler, directory=str(site), page=page)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", "--window-size=1400,1000", "--virtual-time-budget=60000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--dump-dom",
        f"http://127.0.0.1:{server.server_port}/probe",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return json.loads(html.unescape(text))


def test_a_link_to_a_heading_lands_on_it(found):
    """The last heading of each long page; the window is 800 pixels high."""
    assert len(found["landings"]) >= 20
    missed = {link: top for link, top in found["landings"].items() if not 0 <= top < 200}
    assert missed == {}


@pytest.mark.parametrize("query", FIRST)
def test_a_search_finds_the_right_page_first(found, query):
    assert re.search(f"/{FIRST[query]}$", found["results"][query] or "nothing")


def test_a_page_is_as_wide_as_the_window(found, request):
    """Tables, equations and code scroll by themselves."""
    width = {"desktop": 1280, "phone": 390}[request.node.callspec.id]
    assert {page for page, wide in found["widths"].items() if wide > width} == set()
