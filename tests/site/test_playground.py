"""The playground: its numbers are those of JAX, and a browser opens it without a network."""

import html
import json
import re
import shutil
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax

PAGE = Path(__file__).parents[2] / "docs" / "playground"
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
needs_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

STEPS = 60  # as many as the page shows
START = {"w": 5.0, "b": -2.61234136, "T": 50, "rate": 0.1, "steps": STEPS}
PATHS = [
    START | {"limit": 1.0},
    START | {"limit": 0.1},
    START | {"limit": 1e9},
    START | {"limit": 0.01},
    START | {"b": -2.3, "rate": 0.5, "limit": 0.05},
    START | {"w": 4.4, "T": 20, "limit": 0.3},
    START | {"w": 3.6, "b": -1.8, "T": 100, "limit": 10.0},
    START | {"w": 4.3, "b": -2.33, "T": 40, "limit": 1.0},  # as the page opens
    START | {"w": 4.3, "b": -2.33, "T": 40, "limit": 1e9},
]
RADII = [(0.8, 30, -1.5), (0.9, 60, -2.0), (1.25, 50, -2.61234136), (1.4, 50, -2.9857726)]
HASH = "#rho=1.1&T=30&limit=0.5&rate=0.2&b=-2.2&step=7&view=surface&window=whole&turn=-40&x=1"

# Runs in the page after its own script, and leaves what it found as JSON in the document.
PROBE = """
// Where the machine is busy, the browser draws no frame for seconds of virtual time. As timers
// frames come in their turn, so that what the page draws by itself is there when it is read.
window.requestAnimationFrame = (callback) => setTimeout(() => callback(performance.now()), 16);
window.cancelAnimationFrame = clearTimeout;
window.addEventListener("load", async () => {
  const { playground: at, location } = window;
  const state = at.tab.state;
  const find = (id) => document.getElementById(id);
  const later = (time) => new Promise((resolve) => setTimeout(resolve, time));
  const set = (id, value) => {
    find(id).value = value;
    find(id).dispatchEvent(new Event(find(id).type === "range" ? "input" : "change"));
  };
  // Where texts stand on each canvas, as the browser measures them.
  const texts = new Map();
  const fill = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
    const width = this.measureText(text).width;
    const left = x - { left: 0, start: 0, center: width / 2, right: width }[this.textAlign];
    texts.get(this.canvas.id)?.push({ text, left, right: left + width, top: y - 6, bottom: y + 6 });
    fill.call(this, text, x, y);
  };
  const faults = (draw, ids) => {
    for (const id of ids) texts.set(id, []);
    draw();
    const found = [];
    for (const id of ids) {
      const all = texts.get(id);
      const { clientWidth, clientHeight } = find(id);
      all.forEach((one, i) => {
        const inside = one.left >= 0 && one.right <= clientWidth && one.top >= 0;
        if (!inside || one.bottom > clientHeight) found.push(`${id}: ${one.text} is cut`);
        for (const other of all.slice(0, i)) {
          if (one.left < other.right && other.left < one.right &&
              one.top < other.bottom && other.top < one.bottom) {
            found.push(`${id}: ${one.text} covers ${other.text}`);
          }
        }
      });
      texts.set(id + "-seen", all.map(({ text }) => text));
      texts.delete(id);
    }
    return found;
  };
  const ends = (sliders) => sliders.flatMap((id) => [[id, find(id).min], [id, find(id).max]]);
  const colors = (id) => {
    const { width, height } = find(id);
    const copy = Object.assign(document.createElement("canvas"), { width, height });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(find(id), 0, 0);
    const data = context.getImageData(0, 0, width, height).data;
    return new Set(new Uint32Array(data.buffer)).size;
  };
  const canvases = () => ["terrain", "norms", "jacobians"].map(colors);
  const unnamed = [...document.querySelectorAll("input, button, canvas")].filter((element) => {
    const label = element.labels && element.labels.length ? element.labels[0].textContent : "";
    return !(label || element.textContent || element.getAttribute("aria-label")).trim();
  });
  await later(600);
  const found = {
    paths: PATHS.map(at.descend),
    jacobians: RADII.map((setting) => at.jacobians(...setting)),
    crests: [4.6, 4.8, 5, 5.2, 5.4].map((w) => at.gradient(w, at.crest(w, 50), 50).norm),
    crest: at.crest(5, 50),
    gentle: [50, 100].map((T) => at.gradient(3.6, at.crest(3.6, T), T).norm),
    losses: [at.loss(5, -2.61234136, 50), at.loss(3, -1, 9), at.gradient(3, -1, 9).loss],
    factors: [at.clipFactor(2, 1), at.clipFactor(1, 1), at.clipFactor(NaN, 1), at.clipFactor(0, 0)],
    unnamed: unnamed.map((element) => element.id),
    shared: { ...state },
    sliders: ["rho", "T", "limit", "rate", "step", "turn", "b"].map((id) => find(id).value),
    outputs: ["rho", "T", "limit", "rate", "step"].map((id) => find(`${id}-value`).textContent),
    surface: canvases(),
  };
  find("defaults").click();
  await later(600);
  found.hash = location.hash;
  found.defaults = { ...state };
  found.verdict = find("verdict").textContent;
  found.map = canvases();
  found.status = find("status").textContent;
  found.label = find("terrain").getAttribute("aria-label");
  const { left, top, width, height } = find("terrain").getBoundingClientRect();
  const where = { clientX: left + 54 + (width - 112) / 2, clientY: top + 10 + (height - 50) / 2 };
  find("terrain").dispatchEvent(new MouseEvent("click", where));
  found.clicked = { ...state };
  set("rho", 1.2);
  found.moved = { ...state };
  set("limit", -1);
  found.limit = state.limit;
  find("crest").click();
  found.onCrest = state.b;
  found.typed = ["-9", "", "0.5", "-2"].map((value) => {
    set("b", value);
    return [state.b, find("b").value, find("note").textContent];
  });
  find("reset").click();
  find("step-once").click();
  found.stepped = state.step;
  find("play").click();
  await later(1000);
  found.played = state.step;
  found.button = find("play").textContent;
  find("play").click();
  const paused = state.step;
  await later(500);
  found.paused = state.step - paused;
  location.hash = "#limit=7&b=nonsense&view=nowhere&T=1e9";
  await later(600);
  found.pasted = { ...state };
  found.pastedHash = location.hash;
  found.note = find("note").textContent;
  new Image().src = "https://example.org/picture.png"; // the policy of the page refuses it
  await later(100);
  found.faults = [];
  const cliffSliders = ["rho", "T", "limit", "rate", "step", "turn"];
  const rules = [...document.styleSheets[0].cssRules];
  const widths = rules.filter(({ media }) => /width/.test(media?.mediaText));
  const [phone, desk] = widths.map(({ media }) => media);
  const setWidth = (width) => { // with the style of that width, in a window that stays as it is
    document.body.style.width = width;
    [phone.mediaText, desk.mediaText] = width === "358px" ? ["all", "not all"] : ["not all", "all"];
  };
  for (const [width, view, where] of [
    ["1240px", "map", "near"], ["358px", "map", "near"], ["358px", "map", "whole"],
    ["358px", "surface", "near"],
  ]) {
    setWidth(width);
    for (const [id, value] of [["step", 60], ...ends(cliffSliders)]) {
      if (id === "turn" && view === "map") continue;
      at.tab.change({ ...at.tab.defaults, view, window: where }, { remember: false });
      set(id, value);
      const seen = faults(at.tab.draw, ["terrain", "norms", "jacobians"]);
      if (!texts.get("norms-seen").some((text) => text.startsWith("limit"))) seen.push("limit");
      if (document.body.scrollWidth > document.body.clientWidth) seen.push("too wide");
      const setting = `${width} ${view} ${where} ${id}=${value}`;
      found.faults.push(...seen.map((fault) => `${setting} ${fault}`));
    }
  }
  find("tab-training").click();
  await later(600);
  const { training } = at;
  found.training = { hash: location.hash, hidden: find("cliff").hidden };
  found.training.drawn = training.see().steps;
  find("rnn-play").click();
  found.training.button = (await later(100), find("rnn-play").textContent);
  const stopped = training.see().steps;
  await later(200);
  found.training.paused = training.see().steps - stopped;
  while (training.see().steps < 1000) training.step();
  for (const width of ["1240px", "358px"]) {
    setWidth(width);
    const seen = faults(training.tab.draw, ["rnn-losses", "rnn-norms"]);
    found.faults.push(...seen.map((fault) => `${width} ${fault}`));
  }
  found.training.labels = [...texts.get("rnn-losses-seen"), ...texts.get("rnn-norms-seen")];
  found.training.verdict = find("rnn-verdict").textContent;
  found.training.cells = ["free", "clipped"].map((name) => find(`rnn-${name}-errors`).textContent);
  found.training.colors = ["rnn-losses", "rnn-norms"].map(colors);
  const weights = () => [...training.see().nets.clipped.weights.slice(0, 9)];
  const begun = () => { training.tab.hide(); while (training.see().steps < 3) training.step(); };
  find("rnn-reset").click(), begun();
  found.training.same = [weights(), (find("rnn-reset").click(), begun(), weights())];
  set("rnn-seed", "-5"), begun();
  found.training.other = [find("rnn-seed").value, find("note").textContent, weights()];
  for (const [id, value] of ends(["rnn-radius", "rnn-T", "rnn-limit", "rnn-rate"])) {
    training.tab.change(training.tab.defaults, { remember: false });
    set(id, value), begun();
    while (training.see().steps < 8) training.step();
    const seen = faults(training.tab.draw, ["rnn-losses", "rnn-norms"]);
    found.faults.push(...seen.map((fault) => `${id}=${value} ${fault}`));
  }
  location.hash = "#tab=training&radius=9&T=12&limit=2&rate=0.1&seed=7";
  await later(600);
  found.training.pasted = { ...training.tab.state };
  found.training.pastedNote = find("note").textContent;
  training.tab.hide();
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});
"""


def browse(address: str, profile: Path, *options: str) -> tuple[str, list[str]]:
    """What the browser prints, and what the page logs."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet,
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
        "--enable-logging=stderr", *options, address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the page computes and does, in one start of the browser."""
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    probe = PROBE.replace("PATHS", json.dumps(PATHS)).replace("RADII", json.dumps(RADII))
    (folder / "probe.js").write_text(probe, encoding="utf-8")
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = page.replace("</body>", '<script src="probe.js"></script></body>')
    (folder / "index.html").write_text(page, encoding="utf-8")
    options = ["--virtual-time-budget=12000", "--dump-dom", "--window-size=1280,1000"]
    address = (folder / "index.html").as_uri() + HASH
    document, messages = browse(address, folder / "profile", *options)
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', document, flags=re.DOTALL)
    return json.loads(html.unescape(text)) | {"messages": messages}


def loss(params, length):
    def step(_, x):
        return params["w"] * jax.nn.sigmoid(x) + params["b"]

    return (jax.nn.sigmoid(jax.lax.fori_loop(0, length, step, jnp.asarray(0.5))) - 0.7) ** 2


@jax.jit
def descend(setting):
    """The points of a path, with their losses, norms and factors, by JAX and this library."""
    clip = gradclip_jax.clip_by_global_norm(setting["limit"])
    optimizer = optax.chain(clip, optax.sgd(setting["rate"]))

    def step(carry, _):
        params, state = carry
        value, grads = loss(params, setting["T"]), jax.jacfwd(loss)(params, setting["T"])
        updates, state = optimizer.update(grads, state, params)
        seen = gradclip_jax.metrics(state)
        point = params | {"loss": value, "norm": seen["grad_norm"], "factor": seen["clip_factor"]}
        return (optax.apply_updates(params, updates), state), point

    params = {name: setting[name] for name in ("w", "b")}
    return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS + 1)[1]


@jax.jit
def jacobians_in_time(rho, b):
    """The Jacobians of the four networks at each time step."""
    rotation = rho * jnp.array([[jnp.cos(1.0), -jnp.sin(1.0)], [jnp.sin(1.0), jnp.cos(1.0)]])
    shear = jnp.stack([jnp.stack([rho, 3 * jnp.ones_like(rho)]), rho * jnp.array([0.0, 1.0])])
    networks = {
        "rotation": (lambda h: rotation @ h, [0.5, 0.0]),
        "shear": (lambda h: shear @ h, [0.5, 0.0]),
        "tanh": (lambda h: jnp.tanh(rotation @ h), [0.5, 0.0]),
        "unit": (lambda h: 4 * rho * jax.nn.sigmoid(h) + b, [0.5]),
    }

    def in_time(network, first):
        def step(h, _):
            return network(h), jax.jacfwd(network)(h)

        return jax.lax.scan(step, jnp.array(first), length=60)[1]

    return {name: in_time(*network) for name, network in networks.items()}


@needs_a_browser
@pytest.mark.parametrize("which", range(len(PATHS)))
def test_paths_are_those_of_jax_and_this_library(found, x64, which):
    """Up to rounding, which each crossing of the cliff magnifies: 2e-11 to 5e-9 was measured."""
    points = descend(jax.tree.map(jnp.asarray, PATHS[which]))
    for name, expected in points.items():
        values = [point[name] for point in found["paths"][which]]
        close = partial(np.testing.assert_allclose, atol=1e-12, err_msg=name)
        close(values[:21], expected[:21], rtol=1e-9)
        close(values, expected, rtol=1e-6)


@needs_a_browser
def test_the_cliff_of_pascanu_to_eight_digits(found):
    start, clipped = found["paths"][0][:2]
    assert round(start["loss"], 8) == 0.14960413
    assert round(start["norm"], 3) == 6773.125
    assert (round(clipped["w"], 8), round(clipped["b"], 8)) == (5.05282231, -2.52743080)
    assert round(clipped["loss"], 8) == 0.02586525
    less = found["paths"][1][1]
    assert (round(less["w"], 8), round(less["b"], 8)) == (5.00528223, -2.60385030)
    assert round(less["loss"], 8) == 0.01215804
    free = found["paths"][2][1]
    assert (round(free["w"], 3), round(free["b"], 3)) == (362.772, 572.498)
    assert round(free["loss"], 8) == 0.09
    assert found["crest"] == -2.61234136
    peaks = [315.7, 1396.3, 6773.1, 34241.6, 173678]
    np.testing.assert_allclose(found["crests"], peaks, rtol=1e-4)
    assert found["losses"][0] == start["loss"]
    assert found["losses"][1] == found["losses"][2]
    assert found["factors"] == [0.5, 1, 0, 1]


@needs_a_browser
@pytest.mark.parametrize("which", range(len(RADII)))
def test_products_of_jacobians_are_those_of_jax(found, x64, which):
    rho, length, b = RADII[which]
    for name, jacobians in jacobians_in_time(jnp.asarray(rho), jnp.asarray(b)).items():
        product, norms = np.eye(jacobians.shape[-1]), [1.0]
        for jacobian in np.asarray(jacobians)[:length][::-1]:
            product = product @ jacobian
            norms.append(np.linalg.norm(product, 2))
        np.testing.assert_allclose(found["jacobians"][which][name], norms, rtol=1e-9, err_msg=name)


@needs_a_browser
def test_the_page_says_what_the_numbers_say(found):
    shear = found["jacobians"][1]["shear"]
    assert (round(shear[1], 6), round(max(shear), 6)) == (3.249286, 11.635514)
    assert shear.index(max(shear)) == 9
    assert min(k for k in range(1, 61) if shear[k] < 1) == 49
    for (rho, length, _), norms in zip(RADII, found["jacobians"], strict=True):
        np.testing.assert_allclose(norms["rotation"], rho ** np.arange(length + 1.0), rtol=1e-12)
        assert max(norms["tanh"]) < 2  # saturated, where the linear network is not
        assert (norms["unit"][-1] > 1000) == (rho > 1)  # both starts above are on the crest
    assert max(found["gentle"]) < 1.3  # no cliff at rho 0.9, whatever T

    free = [point["norm"] for point in found["paths"][2]]
    assert free[0] > 6773
    assert set(free[1:]) == {0}
    clipped = found["paths"][0]
    assert max(abs(point["b"] - (0.5 - 0.62246 * point["w"])) for point in clipped) < 0.15
    calm = [point["norm"] for point in clipped if point["factor"] == 1]
    assert len(calm) == len(clipped) - 4
    assert 0.1 < min(calm) < max(calm) < 0.4
    sides = [point["loss"] > 0.3 for point in clipped]
    assert sum(one != other for one, other in pairwise(sides)) > 10  # to and fro
    assert max(point["factor"] for point in found["paths"][3]) < 1


@needs_a_browser
def test_the_address_sets_what_is_shown_and_holds_it(found):
    shared = {
        "rho": 1.1, "T": 30, "limit": 0.5, "rate": 0.2, "b": -2.2, "step": 7, "turn": -40,
        "view": "surface", "window": "whole",
    }  # fmt: skip
    assert found["shared"] == shared
    assert found["sliders"][:2] == ["1.1", "30"]
    np.testing.assert_allclose(float(found["sliders"][2]), np.log10(0.5), atol=0.026)
    assert found["sliders"][4:] == ["7", "-40", "-2.2"]
    assert found["outputs"] == ["1.1", "30", "0.5", "0.2", "7"]
    defaults = found["defaults"]
    pairs = (pair.split("=") for pair in found["hash"].removeprefix("#").split("&"))
    assert dict(pairs) == {name: f"{value}" for name, value in defaults.items()}


@needs_a_browser
def test_a_value_outside_its_range_is_shown_as_taken(found):
    """The next value that is valid, and a sentence that says so; the address follows."""
    taken = {"limit": 7, "T": 100}
    assert found["pasted"] == found["defaults"] | taken
    assert "T=100&limit=7&" in found["pastedHash"]
    assert found["note"] == (
        "start: b must be from −4 to 0, got “nonsense”: −2.33 is used. "
        "view must be map or surface, got nowhere: map is used. "
        "sequence length T must be a whole number from 5 to 100, got 1e9: 100 is used."
    )
    rule = "start: b must be from −4 to 0, got"
    assert found["typed"] == [
        [-4, "-4", f"{rule} −9: −4 is used."],
        [-4, "-4", f"{rule} “”: −4 is used."],
        [0, "0", f"{rule} 0.5: 0 is used."],
        [-2, "-2", ""],
    ]


@needs_a_browser
def test_the_page_opens_where_the_clip_wins_and_says_why(found):
    clipped, free = found["paths"][-2:]
    assert [point["factor"] < 1 for point in clipped].count(True) == 1
    assert max(point["norm"] for point in free) == free[3]["norm"]
    assert clipped[-1]["loss"] < 1e-4 < 0.08 < free[-1]["loss"]
    assert found["verdict"] == (
        "The clip wins: without it, step 4 follows a gradient of norm 25.9 over a distance of "
        "2.59, and the path ends at a loss of 0.08784; with it, a step is at most limit × "
        "learning rate = 0.1 long, and the path ends at 1.57·10⁻⁵."
    )


@needs_a_browser
def test_no_label_covers_another_at_the_ends_of_the_sliders(found):
    """At the widths of a desk and of a phone, where no label is cut either."""
    assert found["faults"] == []


@needs_a_browser
def test_a_network_trains_in_the_second_tab(found):
    """Its numbers are those of test_rnn.py; here the clip wins, and the page says so."""
    training = found["training"]
    assert training["hidden"]
    assert training["hash"] == "#tab=training&radius=1.2&T=20&limit=1&rate=0.1&seed=2"
    assert training["drawn"] > 20
    assert (training["button"], training["paused"]) == ("Train", 0)
    assert training["cells"][1] == "0 %"
    assert int(training["cells"][0].split()[0]) > 40
    assert training["verdict"].startswith("The clip wins: 0 % errors with it, ")
    for label in ("guess", "limit 1", "clipped", "not clipped"):
        assert label in training["labels"]
    assert min(training["colors"]) > 20
    assert training["same"][0] == training["same"][1]
    seed, note, weights = training["other"]
    assert (seed, note) == ("0", "seed must be a whole number from 0 to 999999, got −5: 0 is used.")
    assert weights != training["same"][0]
    assert training["pasted"] == {"radius": 2, "T": 12, "limit": 2, "rate": 0.1, "seed": 7}
    assert (
        training["pastedNote"] == "initial spectral radius must be from 0.5 to 2, got 9: 2 is used."
    )


@needs_a_browser
def test_clicks_sliders_and_buttons_work(found):
    middle = {"rho": 4.21 / 4, "b": -2.1255}  # of the map
    for name, value in middle.items():
        assert found["clicked"][name] == pytest.approx(value, abs=0.005)
    # The start keeps its distance from the cliff, which falls by σ(1/2) per unit of w.
    moved = found["clicked"]["b"] - (4.8 - 4 * found["clicked"]["rho"]) / (1 + np.exp(-0.5))
    assert found["moved"]["rho"] == 1.2
    assert found["moved"]["b"] == pytest.approx(moved, abs=1e-7)
    assert round(found["onCrest"], 3) == -2.489  # for w = 4.8
    assert found["limit"] == 0.1
    assert found["stepped"] == 1
    assert found["played"] > 3
    assert found["button"] == "Pause"
    assert found["paused"] == 0


@needs_a_browser
def test_pictures_are_drawn_and_described(found):
    for colors in found["map"] + found["surface"]:
        assert colors > 20
    assert found["unnamed"] == []
    assert "Step 60. Without a clip: w 5.603, b 0.03493, loss 0.08784" in found["status"]
    assert found["status"] in found["label"]


@needs_a_browser
def test_the_page_opens_from_a_disk_without_a_network(found, tmp_path):
    """The policy of the page forbids everything but its script, and a breach would be logged."""
    picture = tmp_path / "page.png"
    options = [f"--screenshot={picture}", "--window-size=1280,1450"]
    _, messages = browse((PAGE / "index.html").as_uri(), tmp_path / "profile", *options)
    assert messages == []
    assert picture.stat().st_size > 60_000
    (refused,) = found["messages"]  # of the request that the probe makes
    assert "Content Security Policy" in refused


def test_the_page_loads_its_scripts_alone():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    scripts = ["page.js", "playground.js", "rnn.js", "training.js"]
    texts = page + "".join((PAGE / name).read_text(encoding="utf-8") for name in scripts)
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', page) == ["data:,", *scripts]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\b|@import|url\(", texts)
    assert set(re.findall(r"https?://[^\s\"<)]*", texts)) == {"https://arxiv.org/abs/1211.5063"}
    assert '<a href="../index.html">' in page  # back to the site
