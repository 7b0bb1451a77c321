"""What a monitor shows: pictures, one page that a browser opens offline, and rows in files."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from io import BufferedWriter, FileIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gradclip_jax
from gradclip_jax._monitor import background

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
plots = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs the extra plots"
)


@pytest.fixture(scope="module")
def monitor() -> gradclip_jax.Monitor:
    """A run of 60 steps with spikes, a NaN, two leaves and a loss."""
    seen = gradclip_jax.Monitor(on_alert=lambda alert: None)
    rng = np.random.default_rng(0)
    for step in range(60):
        norm = float(np.exp(rng.normal()) * (50 if step % 20 == 19 else 1))
        norm = np.nan if step == 30 else norm
        metrics = {
            "grad_norm": jnp.float32(norm), "clip_limit": 2.0, "clip_factor": min(1, 2 / norm),
            "clipped": float(norm > 2), "grad_norm/a/w": norm * 0.8, "grad_norm/b": norm * 0.6,
        }  # fmt: skip
        seen.record(step, metrics, loss=3 / (1 + step))
    return seen


@plots
def test_pictures_show_what_was_recorded(monitor, tmp_path):
    figure = monitor.plot(tmp_path / "norms.png")
    above, below = figure.axes
    clipped = next(line for line in above.lines if line.get_label() == "clipped")
    norms = monitor.history["grad_norm"]
    np.testing.assert_array_equal(clipped.get_ydata(), norms[norms > 2])
    np.testing.assert_allclose(below.lines[0].get_ydata(), 3 / (1 + np.arange(60)))
    monitor.plot_histogram(tmp_path / "histogram.png", candidates=[1.0, 5.0])
    heat = monitor.plot_leaves(tmp_path / "leaves.png")
    labels = {label.get_position()[1]: label.get_text() for label in heat.axes[0].get_yticklabels()}
    assert labels == {0.5: "a/w", 1.5: "b"}
    for name in ("norms", "histogram", "leaves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@plots
def test_a_run_without_leaves_loss_or_limit_is_drawn_too(tmp_path):
    bare = gradclip_jax.Monitor()
    bare.record(0, {"grad_norm": 1.0})
    assert len(bare.plot().axes) == 1
    bare.save_html(tmp_path / "run.html")
    with pytest.raises(ValueError, match="`per_layer=True`"):
        bare.plot_leaves()
    with pytest.raises(ValueError, match="nothing was recorded"):
        gradclip_jax.Monitor().plot()


ODD_NAMES = [r"x$\frac{1$", "$a$", "under_score^2", "100 % of #1 & {2}", "a\\b", "<b>", "-->"]


@plots
def test_a_leaf_is_drawn_by_its_name_whatever_it_is(tmp_path):
    """Two dollars begin a formula in matplotlib, where text is not said to be text."""
    seen = gradclip_jax.Monitor()
    seen.record(0, {"grad_norm": 1.0} | {f"grad_norm/{name}": 1.0 for name in ODD_NAMES})
    labels = seen.plot_leaves(tmp_path / "leaves.svg").axes[0].get_yticklabels()
    assert {label.get_text() for label in labels} == set(ODD_NAMES)
    assert not any(label.get_parse_math() or label.get_usetex() for label in labels)
    seen.save_html(tmp_path / "run.html")
    assert "<b>" not in (tmp_path / "run.html").read_text(encoding="utf-8")


@plots
def test_the_page_holds_everything_itself(monitor, tmp_path):
    monitor.save_html(tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert "<script" not in text
    # Names of XML namespaces are no addresses that a browser opens.
    links = re.findall(r'(?:href|src)="(?!#|data:)([^"]*)"', text)
    assert links == []
    assert "nonfinite" in text
    assert '<meta name="viewport" content="width=device-width' in text  # else a phone shrinks it
    assert "prefers-color-scheme: dark" in text


@plots
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_opens_the_page_without_errors(monitor, tmp_path):
    monitor.save_html(tmp_path / "run.html")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet,
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--window-size=1000,1600", f"--screenshot={tmp_path / 'run.png'}",
        (tmp_path / "run.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    # A page of one colour compresses to a few kilobytes.
    assert (tmp_path / "run.png").stat().st_size > 40_000


def test_rows_go_to_tensorboard_csv_and_json_lines(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    events: list[tuple[int, float]] = []
    writers = [
        gradclip_jax.monitor.to_tensorboard(tmp_path / "board"),
        gradclip_jax.monitor.to_csv(tmp_path / "rows.csv"),
        gradclip_jax.monitor.to_json_lines(tmp_path / "rows.jsonl"),
        lambda step, row: events.append((step, row["grad_norm"])),
    ]
    seen = gradclip_jax.Monitor(writers=writers)
    for step, norm in enumerate([1.0, 2.5]):
        seen.record(step, {"grad_norm": norm})
    seen.flush()
    assert events == [(0, 1.0), (1, 2.5)]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["step"], row["grad_norm"], row["loss"]) for row in rows] == [
        (0, 1.0, None),
        (1, 2.5, None),
    ]
    header, *lines = (tmp_path / "rows.csv").read_text().splitlines()
    column = header.split(",").index("grad_norm")
    assert [line.split(",")[column] for line in lines] == ["1.0", "2.5"]
    (file,) = (tmp_path / "board").iterdir()
    deadline = time.monotonic() + 30
    while ("grad_norm", 2.5) not in scalars(file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ("grad_norm", 2.5) in scalars(file.read_bytes())


def scalars(records: bytes) -> list[tuple[str, float]]:
    """Tags and values of an event file: length, checksum, event, checksum, again and again."""
    from tensorboardX.proto import event_pb2

    found, at = [], 0
    while at < len(records):
        size = int.from_bytes(records[at : at + 8], "little")
        if at + 16 + size > len(records):  # it is being written
            break
        event = event_pb2.Event.FromString(records[at + 12 : at + 12 + size])
        found += [(value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + size
    return found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_ends_the_events_of_tensorboard_and_not_the_training(monkeypatch, tmp_path):
    files = pytest.importorskip("tensorboardX.record_writer", reason="needs the extra tensorboard")
    monkeypatch.setattr(files, "open_file", lambda path: BufferedWriter(FileIO("/dev/full", "w")))
    monkeypatch.setattr(background, "PERIOD", 0.01)
    monitor = gradclip_jax.Monitor(writers=[gradclip_jax.monitor.to_tensorboard(tmp_path)])

    def steps():
        for step in range(300):
            monitor.record(step, {"grad_norm": 1.0 + step % 7})
            time.sleep(1e-3)

    def train():  # in a thread, which may hang
        training = threading.Thread(target=steps, daemon=True)
        training.start()
        training.join(60)
        assert not training.is_alive()

    with pytest.warns(RuntimeWarning, match="got OSError: .*No space left on device") as told:
        train()
    assert [warning.filename for warning in told] == [__file__]
    assert monitor.history["step"].tolist() == list(range(300))


def test_a_csv_file_of_another_run_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("step,something\n")
    seen = gradclip_jax.Monitor(writers=[gradclip_jax.monitor.to_csv(tmp_path / "rows.csv")])
    with pytest.raises(ValueError, match="with step,something"):
        seen.record(0, {"grad_norm": 1.0})


@pytest.mark.parametrize("name", ["a,b", 'say "norm"', "two\nlines", "tab\tbed", "ünïcode", "'=x"])
def test_a_csv_file_with_any_column_is_read_back_and_continued(name, tmp_path):
    path = tmp_path / "rows.csv"
    for step in range(2):  # the second time by another writer, as after a restart
        gradclip_jax.monitor.to_csv(path)(step, {"grad_norm": 1.5, name: 2.0 + step})
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[name]) for row in rows] == [2, 3]
    assert [float(row["grad_norm"]) for row in rows] == [1.5, 1.5]


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", '=HYPERLINK("http://x")'])
def test_a_column_is_no_formula_in_a_spreadsheet(name, tmp_path):
    path = tmp_path / "rows.csv"
    for step in range(2):
        gradclip_jax.monitor.to_csv(path)(step, {name: -2.0})
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "'" + name]
    assert rows == [["0", "-2.0"], ["1", "-2.0"]]


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("matplotlib.figure", lambda seen: seen.plot()),
        ("tensorboardX", lambda seen: gradclip_jax.monitor.to_tensorboard("board")),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, package, use):
    seen = gradclip_jax.Monitor()
    seen.record(0, {"grad_norm": 1.0})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"gradclip-jax\[(plots|tensorboard)\]"):
        use(seen)
