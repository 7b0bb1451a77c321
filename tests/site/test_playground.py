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
]
RADII = [(0.8, 30, -1.5), (0.9, 60, -2.0), (1.25, 50, -2.61234136), (1.4, 50, -2.9857726)]
HASH = "#rho=1.1&T=30&limit=0.5&rate=0.2&b=-2.2&step=7&view=surface&window=whole&turn=-40&x=1"

# Runs in the page after its own script, and leaves what it found as JSON in the document.
PROBE = """
(async () => {
  const { playground: at, location } = window;
  const find = (id) => document.getElementById(id);
  // Where the machine is busy, the browser draws no frame for seconds of virtual time. As timers
  // frames come in their turn, so that what the page draws by itself is there when it is read.
  window.requestAnimationFrame = (callback) => setTimeout(() => callback(performance.now()), 16);
  window.cancelAnimationFrame = clearTimeout;
  const later = (time) => new Promise((resolve) => setTimeout(resolve, time));
  const set = (id, value) => {
    find(id).value = value;
    find(id).dispatchEvent(new Event("input"));
  };
  const colours = (id) => {
    const { width, height } = find(id);
    const copy = Object.assign(document.createElement("canvas"), { width, height });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(find(id), 0, 0);
    const data = context.getImageData(0, 0, width, height).data;
    return new Set(new Uint32Array(data.buffer)).size;
  };
  const canvases = () => ["terrain", "norms", "jacobians"].map(colours);
  const unnamed = [...document.querySelectorAll("input, button, canvas")].filter((element) => {
    const label = element.labels && element.labels.length ? element.labels[0].textContent : "";
    return !(label || element.textContent || element.getAttribute("aria-label")).trim();
  });
  const found = {
    paths: PATHS.map(at.descend),
    jacobians: RADII.map((setting) => at.jacobians(...setting)),
    crests: [4.6, 4.8, 5, 5.2, 5.4].map((w) => at.gradient(w, at.crest(w, 50), 50).norm),
    crest: at.crest(5, 50),
    gentle: [50, 100].map((T) => at.gradient(3.6, at.crest(3.6, T), T).norm),
    losses: [at.loss(5, -2.61234136, 50), at.loss(3, -1, 9), at.gradient(3, -1, 9).loss],
    factors: [at.clipFactor(2, 1), at.clipFactor(1, 1), at.clipFactor(NaN, 1), at.clipFactor(0, 0)],
    unnamed: unnamed.map((element) => element.id),
    shared: { ...at.state },
    sliders: ["rho", "T", "limit", "rate", "step", "turn", "b"].map((id) => find(id).value),
    outputs: ["rho", "T", "limit", "rate", "step"].map((id) => find(`${id}-value`).textContent),
    surface: canvases(),
  };
  find("defaults").click();
  await later(600);
  found.hash = location.hash;
  found.defaults = { ...at.state };
  found.map = canvases();
  found.status = find("status").textContent;
  found.label = find("terrain").getAttribute("aria-label");
  const { left, top, width, height } = find("terrain").getBoundingClientRect();
  const where = { clientX: left + 54 + (width - 112) / 2, clientY: top + 10 + (height - 50) / 2 };
  find("terrain").dispatchEvent(new MouseEvent("click", where));
  found.clicked = { ...at.state };
  set("rho", 1.2);
  found.moved = { ...at.state };
  set("limit", -1);
  found.limit = at.state.limit;
  find("reset").click();
  find("step-once").click();
  found.stepped = at.state.step;
  find("play").click();
  await later(1000);
  found.played = at.state.step;
  found.button = find("play").textContent;
  find("play").click();
  const paused = at.state.step;
  await later(500);
  found.paused = at.state.step - paused;
  location.hash = "#limit=7&b=nonsense&view=nowhere&T=1e9";
  await later(300);
  found.pasted = { ...at.state };
  new Image().src = "https://example.org/picture.png"; // the policy of the page refuses it
  await later(100);
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
})();
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
    options = ["--virtual-time-budget=6000", "--dump-dom", "--window-size=1280,1000"]
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
    assert found["outputs"] == ["1.100", "30", "0.5", "0.2", "7"]
    defaults = found["defaults"]
    assert defaults["b"] == -2.61234136
    pairs = (pair.split("=") for pair in found["hash"].removeprefix("#").split("&"))
    assert dict(pairs) == {name: f"{value}" for name, value in defaults.items()}
    # What is no setting falls back to the default, what is out of range to the end of the range.
    crest = pytest.approx(-2.612296670, abs=1e-8)
    assert found["pasted"] == defaults | {"limit": 7, "T": 100, "b": crest}


@needs_a_browser
def test_clicks_sliders_and_buttons_work(found):
    near = {"rho": 4.96 / 4, "b": -2.5922966560}  # the middle of the map
    for name, value in near.items():
        assert found["clicked"][name] == pytest.approx(value, abs=0.005)
    assert found["moved"]["rho"] == 1.2
    assert round(found["moved"]["b"], 3) == -2.488  # on the crest for w = 4.8
    assert found["limit"] == 0.1
    assert found["stepped"] == 1
    assert found["played"] > 3
    assert found["button"] == "Pause"
    assert found["paused"] == 0


@needs_a_browser
def test_pictures_are_drawn_and_described(found):
    for colours in found["map"] + found["surface"]:
        assert colours > 20
    assert found["unnamed"] == []
    assert "Step 20. Without a clip: w 362.8, b 572.5, loss 0.09000" in found["status"]
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


def test_the_page_loads_its_script_alone():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    script = (PAGE / "playground.js").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', page) == ["data:,", "playground.js"]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\b|@import|url\(", page + script)
    assert set(re.findall(r"https?://[^\s\"<)]*", page + script)) == {
        "https://arxiv.org/abs/1211.5063"
    }
