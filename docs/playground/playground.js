// Back-propagation through time in one recurrent unit: terrain, two descents, and Jacobians.
//
// The unit is that of figure 6 in Pascanu, Mikolov, Bengio 2013 (https://arxiv.org/abs/1211.5063):
// x_t = w σ(x_{t-1}) + b from x_0 = 1/2, with the loss (σ(x_T) − 0.7)². The first half of this file
// is the mathematics, in float64; the second half is the page, with what page.js offers.
"use strict";

(() => {
  const { find, minus, brief, power, number, colors, prepare, scale, ticks } = page;
  const { line, marker, write, logAxes } = page;

  const FIRST = 0.5;
  const TARGET = 0.7;
  const HIGHEST = TARGET ** 2; // the loss as x_T → −∞
  const SLOPE = 0.25; // the largest slope of σ, so that a Jacobian of the unit is at most w / 4

  const sigmoid = (x) => 1 / (1 + Math.exp(-x));

  /** Loss and gradient at (w, b) after T time steps, by carrying dx/dw and dx/db along. */
  function gradient(w, b, T) {
    let x = FIRST;
    let dw = 0;
    let db = 0;
    for (let t = 0; t < T; t++) {
      const s = sigmoid(x);
      const jacobian = w * s * (1 - s);
      dw = s + jacobian * dw;
      db = 1 + jacobian * db;
      x = w * s + b;
    }
    const y = sigmoid(x);
    const slope = 2 * (y - TARGET) * y * (1 - y);
    const [ofW, ofB] = [slope * dw, slope * db];
    return { loss: (y - TARGET) ** 2, w: ofW, b: ofB, norm: Math.hypot(ofW, ofB) };
  }

  function loss(w, b, T) {
    let x = FIRST;
    for (let t = 0; t < T; t++) x = w * sigmoid(x) + b;
    return (sigmoid(x) - TARGET) ** 2;
  }

  /** min(1, limit / norm); 0 where the norm is not finite, as `clip_by_global_norm` does. */
  function clipFactor(norm, limit) {
    if (!Number.isFinite(norm)) return 0;
    return norm > limit ? limit / norm : 1;
  }

  /** Gradient descent: `steps` + 1 points, each with its loss, its norm and its factor. */
  function descend({ w, b, T, limit, rate, steps }) {
    const points = [];
    for (let step = 0; step <= steps; step++) {
      const here = gradient(w, b, T);
      const factor = clipFactor(here.norm, limit);
      points.push({ w, b, loss: here.loss, norm: here.norm, factor });
      if (factor === 0) continue;
      w -= rate * factor * here.w;
      b -= rate * factor * here.b;
    }
    return points;
  }

  /** Where x = 1/2 is a fixed point, an unstable one for w > 1 / σ'(1/2) = 4.26: a cliff. */
  const cliff = (w) => FIRST - w * sigmoid(FIRST);

  /** The b of the largest gradient for this w. It lies below `cliff`, by ever less as T grows. */
  function crest(w, T) {
    const at = (exponent) => gradient(w, cliff(w) - 10 ** exponent, T).norm;
    let best = 0;
    for (let exponent = -15; exponent < 0; exponent += 0.05) {
      if (at(exponent) > at(best)) best = exponent;
    }
    let [low, high] = [best - 0.05, best + 0.05];
    while (high - low > 1e-9) {
      const third = (high - low) / 3;
      if (at(low + third) < at(high - third)) low += third;
      else high -= third;
    }
    const digits = 3 + Math.ceil(Math.max(0, -low)); // of b, enough for three of the distance
    return Number((cliff(w) - 10 ** low).toFixed(digits));
  }

  /** The largest singular value of [[a, b], [c, d]]. */
  function spectralNorm([a, b, c, d]) {
    return (Math.hypot(a + d, b - c) + Math.hypot(a - d, b + c)) / 2;
  }

  const product = ([a, b, c, d], [e, f, g, h]) => [
    a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h,
  ];

  /** 1 and the norms of J_T, J_T J_{T-1}, … for Jacobians in the order of time. */
  function normsBack(jacobians) {
    let back = [1, 0, 0, 1];
    const norms = [1];
    for (const jacobian of [...jacobians].reverse()) {
      back = product(back, jacobian);
      norms.push(spectralNorm(back));
    }
    return norms;
  }

  /** Norms of ∂h_T/∂h_{T-k} for k = 0 … T in four networks whose spectral radius is ρ. */
  function jacobians(rho, T, b) {
    const [c, s] = [rho * Math.cos(1), rho * Math.sin(1)];
    const rotation = [c, -s, s, c]; // by one radian
    const tanh = [];
    for (let t = 0, h = [0.5, 0]; t < T; t++) {
      h = [Math.tanh(c * h[0] - s * h[1]), Math.tanh(s * h[0] + c * h[1])];
      const [p, q] = h.map((value) => 1 - value * value);
      tanh.push([p * c, -p * s, q * s, q * c]);
    }
    const unit = [];
    for (let t = 0, x = FIRST, w = rho / SLOPE; t < T; t++) {
      const y = sigmoid(x);
      unit.push([w * y * (1 - y), 0, 0, 0]);
      x = w * y + b;
    }
    return {
      rotation: normsBack(Array(T).fill(rotation)),
      tanh: normsBack(tanh),
      shear: normsBack(Array(T).fill([rho, 3, 0, rho])),
      unit: normsBack(unit),
    };
  }

  // The settings.

  const STEPS = 60;
  const tab = page.tab("cliff", {
    ranges: {
      rho: [0.7, 1.4], T: [5, 100], limit: [0.01, 1e4], rate: [0.001, 1], b: [-4, 0],
      step: [0, STEPS], turn: [-180, 180],
    },
    choices: { view: ["map", "surface"], window: ["near", "whole"] },
    whole: ["T", "step", "turn"],
    logarithmic: ["limit", "rate"],
    // Below the cliff, so that both paths walk up to it.
    defaults: {
      rho: 1.075, T: 40, limit: 1, rate: 0.1, b: -2.33, step: STEPS, turn: 155,
      view: "map", window: "near",
    },
    /** ρ moves the cliff, and the start keeps its distance from it. */
    follow(before, changes) {
      if (!("rho" in changes) || "b" in changes) return;
      const b = cliff(startW()) + before.b - cliff(before.rho / SLOPE);
      state.b = Math.min(0, Math.max(-4, Number(b.toFixed(8))));
    },
    update,
    draw,
    hide: pause,
  });
  const { state, change } = tab;
  const startW = () => state.rho / SLOPE;

  // What is drawn from them.

  const paths = {};
  let norms = {};

  function update() {
    const common = { w: startW(), b: state.b, T: state.T, rate: state.rate, steps: STEPS };
    paths.free = descend({ ...common, limit: Infinity });
    paths.clipped = descend({ ...common, limit: state.limit });
    norms = jacobians(state.rho, state.T, state.b);
    find("turning").hidden = state.view !== "surface";
    find("terrain").classList.toggle("turns", state.view === "surface");
    find("play").textContent = timer ? "Pause" : state.step === STEPS ? "Play again" : "Play";
    find("step-once").disabled = state.step === STEPS;
  }

  /** The part that is shown. It hops, so that the start moves and not the picture. */
  function shown() {
    if (state.window === "whole") return { w: [2.6, 5.8], b: [-3.4, -0.9] };
    const w = Math.round(startW() * 4) / 4;
    const b = cliff(w) + Math.round((state.b - cliff(w)) / 0.5) * 0.5;
    return { w: [w - 0.38, w + 0.3], b: [b - 0.3, b + 0.34] };
  }

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  /** The color of a loss: by its root, which is |σ(x_T) − 0.7|, so that the valley is seen too. */
  function shade(value) {
    const part = 2 * Math.min(1, Math.sqrt(value / HIGHEST));
    const [from, to] = part < 1 ? ["low", "middle"] : ["middle", "high"];
    const start = channels(colors[from]);
    const end = channels(colors[to]);
    const share = part < 1 ? part : part - 1;
    return start.map((channel, i) => Math.round(channel + share * (end[i] - channel)));
  }

  const rgb = ([r, g, b], light = 1) => `rgb(${[r, g, b].map((c) => Math.round(c * light))})`;

  /** The part of a segment inside a rectangle, as two shares of it (Liang, Barsky 1984). */
  function inside([x0, y0], [x1, y1], box) {
    let [enter, leave] = [0, 1];
    const edges = [
      [x0 - x1, x0 - box.left], [x1 - x0, box.right - x0],
      [y0 - y1, y0 - box.top], [y1 - y0, box.bottom - y0],
    ];
    for (const [along, room] of edges) {
      if (along === 0 && room < 0) return null;
      if (along < 0) enter = Math.max(enter, room / along);
      if (along > 0) leave = Math.min(leave, room / along);
    }
    return enter < leave ? [enter, leave] : null;
  }

  const STYLES = {
    free: { square: true, dash: [6, 4] },
    clipped: { square: false, dash: [] },
  };

  /** A path up to the present step, in the pixels of `project`, and where it leaves the box. */
  function drawPath(context, name, project, box, note = null) {
    const visible = paths[name].slice(0, state.step + 1);
    const pixels = visible.map(project);
    const color = colors[name];
    const gone = [];
    for (const [under, width] of [[colors.paper, 4.5], [color, 2.2]]) {
      for (let i = 1; i < pixels.length; i++) {
        const part = inside(pixels[i - 1], pixels[i], box);
        if (!part) continue;
        const [[x0, y0], [x1, y1]] = [pixels[i - 1], pixels[i]];
        const ends = part.map((share) => [x0 + share * (x1 - x0), y0 + share * (y1 - y0)]);
        const dash = under === color ? STYLES[name].dash : [];
        line(context, ends, { color: under, width, dash });
        if (under === color && part[1] < 1) gone.push({ step: i, from: ends[0], at: ends[1] });
      }
    }
    const within = ([x, y]) => x >= box.left && x <= box.right && y >= box.top && y <= box.bottom;
    let last = [-99, -99];
    pixels.forEach((pixel, i) => {
      const now = i === pixels.length - 1;
      const apart = Math.hypot(pixel[0] - last[0], pixel[1] - last[1]) > 7;
      if (!within(pixel) || !(apart || now)) return; // crowded markers would hide the path
      marker(context, pixel, { color, ...STYLES[name], size: now ? 5.5 : 2.6 });
      last = pixel;
    });
    for (const { step, from, at } of gone.slice(0, 1)) {
      const angle = Math.atan2(at[1] - from[1], at[0] - from[0]);
      context.save();
      context.translate(...at);
      context.rotate(angle);
      context.beginPath();
      context.moveTo(0, 0);
      context.lineTo(-12, -6);
      context.lineTo(-12, 6);
      context.fillStyle = color;
      context.fill();
      context.restore();
      const { w, b } = visible[step];
      const text = `step ${step}: to (${brief(w, 3)}, ${brief(b, 3)})`;
      const right = at[0] > (box.left + box.right) / 2;
      const aside = at[1] + (angle < 0 ? -14 : 14); // where the line does not come from
      const y = Math.min(box.bottom - 14, Math.max(box.top + 14, aside));
      const moves = [0, 16, -16, 32, -32];
      if (note) write(context, text, ...note, { color, moves });
      else {
        write(context, text, at[0] + (right ? -16 : 16), y, {
          align: right ? "right" : "left", color, halo: true, moves,
        });
      }
    }
  }

  // The terrain as a map.

  const COLUMNS = 240;
  const ROWS = 210;
  const LEVELS = [0.002, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4];
  let grid = { key: "" };

  /**
   * Losses at the corners of a grid over w and the height of b over the cliff, so that the rows run
   * along the cliff and its edge has no steps. Kept until the region or T changes.
   */
  function terrain(region, columns, rows) {
    const key = JSON.stringify([region, state.T, columns, rows]);
    if (grid.key === key) return grid;
    const values = new Float64Array((columns + 1) * (rows + 1));
    for (let j = 0; j <= rows; j++) {
      const above = region.above[0] + (j / rows) * (region.above[1] - region.above[0]);
      for (let i = 0; i <= columns; i++) {
        const w = region.w[0] + (i / columns) * (region.w[1] - region.w[0]);
        values[j * (columns + 1) + i] = loss(w, cliff(w) + above, state.T);
      }
    }
    grid = { key, region, values, columns, rows };
    return grid;
  }

  function mapBox(width, height) {
    return { left: 54, right: width - 58, top: 10, bottom: height - 40 };
  }

  /** The place of the grid's corner (i, j) in pixels: an affine map, as the cliff is a line. */
  function placing({ region, columns, rows }, x, y) {
    return (i, j) => {
      const w = region.w[0] + (i / columns) * (region.w[1] - region.w[0]);
      const above = region.above[0] + (j / rows) * (region.above[1] - region.above[0]);
      return [x(w), y(cliff(w) + above)];
    };
  }

  function drawHeat(context, { values, columns, rows }, place) {
    const small = document.createElement("canvas");
    small.width = columns + 1;
    small.height = rows + 1;
    const picture = small.getContext("2d").createImageData(columns + 1, rows + 1);
    for (let at = 0; at < values.length; at++) {
      picture.data.set([...shade(values[at]), 255], 4 * at);
    }
    small.getContext("2d").putImageData(picture, 0, 0);
    const [origin, right, up] = [place(0, 0), place(1, 0), place(0, 1)];
    context.save();
    context.transform(
      right[0] - origin[0], right[1] - origin[1], up[0] - origin[0], up[1] - origin[1], ...origin,
    );
    context.drawImage(small, -0.5, -0.5); // a corner of the grid is the centre of a pixel
    context.restore();
  }

  /** Contours by marching squares: a line through each cell that a level crosses. */
  function drawContours(context, { values, columns, rows }, place) {
    context.beginPath();
    for (let j = 0; j < rows; j++) {
      for (let i = 0; i < columns; i++) {
        const at = j * (columns + 1) + i;
        const corners = [
          [i, j, values[at]], [i + 1, j, values[at + 1]],
          [i + 1, j + 1, values[at + columns + 2]], [i, j + 1, values[at + columns + 1]],
        ];
        for (const level of LEVELS) {
          const cuts = [];
          for (let k = 0; k < 4; k++) {
            const [p, q] = [corners[k], corners[(k + 1) % 4]];
            if (p[2] < level === q[2] < level) continue;
            const share = (level - p[2]) / (q[2] - p[2]);
            cuts.push(place(p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])));
          }
          for (let k = 0; k + 1 < cuts.length; k += 2) {
            context.moveTo(...cuts[k]);
            context.lineTo(...cuts[k + 1]);
          }
        }
      }
    }
    context.strokeStyle = colors.contour;
    context.lineWidth = 0.8;
    context.stroke();
  }

  function drawScale(context, box) {
    const [left, right] = [box.right + 12, box.right + 24];
    const y = (value) => box.bottom - Math.sqrt(value / HIGHEST) * (box.bottom - box.top);
    for (let at = box.top; at < box.bottom; at++) {
      const value = HIGHEST * ((box.bottom - at) / (box.bottom - box.top)) ** 2;
      context.fillStyle = rgb(shade(value));
      context.fillRect(left, at, right - left, 1.5);
    }
    for (const value of [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4]) {
      write(context, String(value), right + 4, Math.min(y(value), box.bottom - 5));
    }
    write(context, "loss", left, box.bottom + 15);
  }

  function drawMap(canvas) {
    const { context, width, height } = prepare(canvas);
    const box = mapBox(width, height);
    const region = shown();
    const x = scale(region.w, [box.left, box.right]);
    const y = scale(region.b, [box.bottom, box.top]);
    const above = [region.b[0] - cliff(region.w[0]), region.b[1] - cliff(region.w[1])];
    const field = terrain({ w: region.w, above }, COLUMNS, ROWS);
    const place = placing(field, x, y);
    context.save();
    context.beginPath();
    context.rect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    context.clip();
    drawHeat(context, field, place);
    drawContours(context, field, place);
    context.restore();
    if (region.w[0] < 1 / SLOPE && region.w[1] > 1 / SLOPE) {
      const at = x(1 / SLOPE);
      line(context, [[at, box.top], [at, box.bottom]], {
        color: colors.ink, width: 1, dash: [2, 4],
      });
      write(context, "ρ = 1", at + 5, box.bottom - 12, { halo: true });
    }
    context.strokeStyle = colors.faint;
    context.lineWidth = 1;
    context.strokeRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    for (const value of ticks(region.w, 5)) {
      write(context, brief(value), x(value), box.bottom + 13, { align: "center" });
    }
    for (const value of ticks(region.b, 6)) {
      write(context, brief(value), box.left - 6, y(value), { align: "right" });
    }
    write(context, "w = 4ρ", (box.left + box.right) / 2, box.bottom + 30, { align: "center" });
    write(context, "b", 8, (box.top + box.bottom) / 2);
    drawScale(context, box);
    for (const name of ["free", "clipped"]) drawPath(context, name, (p) => [x(p.w), y(p.b)], box);
    const start = [x(startW()), y(state.b)];
    marker(context, start, { color: colors.ink, size: 4.5, hollow: true });
  }

  // The terrain as a surface that turns.

  const CELLS = 48;

  function drawSurface(canvas) {
    const { context, width, height } = prepare(canvas);
    const { w, b } = shown();
    const half = (b[1] - b[0]) / (state.window === "near" ? 2 : 3);
    const { region, values } = terrain({ w, above: [-half, half] }, CELLS, CELLS);
    const angle = (state.turn * Math.PI) / 180;
    const size = Math.min(width * 0.64, height * 0.7);
    // Seen from above at 30 degrees, without perspective.
    const depth = (u, v) => u * Math.sin(angle) + v * Math.cos(angle);
    const project = (u, v, value) => [
      width / 2 + size * (u * Math.cos(angle) - v * Math.sin(angle)),
      height * 0.5 - size * (0.5 * depth(u, v) + 0.55 * (value / HIGHEST - 0.5)),
    ];
    const at = (i, j) => [i / CELLS - 0.5, j / CELLS - 0.5, values[j * (CELLS + 1) + i]];
    const faces = [];
    for (let j = 0; j < CELLS; j++) {
      for (let i = 0; i < CELLS; i++) {
        const corners = [at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1)];
        const mean = corners.reduce((sum, [, , value]) => sum + value / 4, 0);
        faces.push({ corners, fill: rgb(shade(mean)) });
      }
      const sides = [
        [at(j, 0), at(j + 1, 0)], [at(j, CELLS), at(j + 1, CELLS)],
        [at(0, j), at(0, j + 1)], [at(CELLS, j), at(CELLS, j + 1)],
      ];
      for (const [p, q] of sides) {
        const corners = [p, q, [q[0], q[1], 0], [p[0], p[1], 0]];
        faces.push({ corners, fill: colors.grid, side: true });
      }
    }
    for (const face of faces) {
      face.depth = face.corners.reduce((sum, [u, v]) => sum + depth(u, v) / 4, 0);
    }
    faces.sort((one, other) => other.depth - one.depth); // those behind first
    for (const { corners, fill, side } of faces) {
      context.beginPath();
      corners.forEach((corner, k) => {
        if (k) context.lineTo(...project(...corner));
        else context.moveTo(...project(...corner));
      });
      context.closePath();
      context.fillStyle = fill;
      context.strokeStyle = side ? fill : colors.contour;
      context.lineWidth = side ? 1 : 0.4;
      context.fill();
      context.stroke();
    }
    const u = scale(region.w, [-0.5, 0.5]);
    const v = scale(region.above, [-0.5, 0.5]);
    const box = { left: 4, right: width - 4, top: 4, bottom: height - 4 };
    write(context, `height: loss, 0 to 0.49; b: cliff ± ${half.toFixed(2)}`, 8, 14);
    for (const name of ["free", "clipped"]) {
      drawPath(context, name, (p) => project(u(p.w), v(p.b - cliff(p.w)), p.loss), box, [8, 32]);
    }
    const start = project(u(startW()), v(state.b - cliff(startW())), paths.free[0].loss);
    marker(context, start, { color: colors.ink, size: 4.5, hollow: true });
    const label = (text, p, q) => {
      const [x, y] = project(p, q, 0);
      write(context, text, x, y + 4, { align: "center", halo: true, moves: [0, 14, -14, 28, -28] });
    };
    const frontU = -0.58 * Math.sign(Math.sin(angle));
    const frontV = -0.58 * Math.sign(Math.cos(angle));
    for (const side of [0, 1]) {
      label(`w ${region.w[side].toFixed(2)}`, side - 0.5, frontV);
      label(side ? "higher b" : "lower b", frontU, 0.6 * (side - 0.5));
    }
  }

  // Curves on a logarithmic scale.

  function drawNorms(canvas) {
    const count = state.step + 1;
    const seen = ["free", "clipped"].map((name) => paths[name].slice(0, count).map((p) => p.norm));
    const { context, box, x, y } = logAxes(canvas, [state.limit, ...seen.flat()], {
      last: STEPS, floor: -6, xLabel: "step of gradient descent",
    });
    const at = y(state.limit);
    const ends = [[box.left, at], [box.right, at]];
    line(context, ends, { color: colors.ink, width: 1.5, dash: [2, 3] });
    ["free", "clipped"].forEach((name, i) => {
      const pixels = seen[i].map((norm, step) => [x(step), y(norm)]);
      line(context, pixels, { color: colors[name], width: 1.8, dash: STYLES[name].dash });
      pixels.forEach((pixel, step) => {
        const hollow = name === "clipped" && paths.clipped[step].factor === 1;
        marker(context, pixel, { color: colors[name], ...STYLES[name], hollow });
      });
    });
    const text = `limit ${brief(state.limit, 3)}`;
    write(context, text, box.right - 4, at - 10, { align: "right", halo: true, moves: [0, 20] });
  }

  const CURVES = { rotation: [8, 4], shear: [], tanh: [2, 3], unit: [10, 3, 2, 3] };

  function drawJacobians(canvas) {
    const { context, box, x, y } = logAxes(canvas, Object.values(norms).flat(), {
      last: state.T, floor: -8, xLabel: "time steps back, k",
    });
    line(context, [[box.left, y(1)], [box.right, y(1)]], { color: colors.ink, width: 1 });
    for (const [name, dash] of Object.entries(CURVES)) {
      const pixels = norms[name].map((norm, k) => [x(k), y(norm)]);
      line(context, pixels, { color: colors[name], width: 2.4, dash });
    }
  }

  // The page.

  /** Which path ends lower, and why, in a sentence. */
  function verdict() {
    if (paths.clipped.every((point) => point.factor === 1)) {
      return "The clip never fires here: both paths are the same.";
    }
    const [free, clipped] = ["free", "clipped"].map((name) => paths[name][STEPS].loss);
    const sizes = paths.free.map((point) => point.norm);
    const largest = Math.max(...sizes);
    const why =
      `without it, step ${sizes.indexOf(largest) + 1} follows a gradient of norm ` +
      `${brief(largest, 3)} over a distance of ${brief(state.rate * largest, 3)}, and the path ends ` +
      `at a loss of ${number(free)}; with it, a step is at most limit × learning rate = ` +
      `${brief(state.limit * state.rate, 3)} long, and the path ends at ${number(clipped)}.`;
    if (clipped < free / 2) return `The clip wins: ${why}`;
    return free < clipped / 2 ? `The clip loses here: ${why}` : `Neither path wins here: ${why}`;
  }

  function describe() {
    find("verdict").textContent = verdict();
    const [free, clipped] = ["free", "clipped"].map((name) => paths[name][state.step]);
    const place = (p) => `w ${number(p.w)}, b ${number(p.b)}, loss ${number(p.loss)}`;
    const rows = { w: "w", b: "b", loss: "loss", norm: "norm" };
    for (const [name, point] of Object.entries({ free, clipped })) {
      for (const key of Object.keys(rows)) find(`${name}-${key}`).textContent = number(point[key]);
    }
    find("clipped-factor").textContent = number(clipped.factor);
    find("now").textContent = `At step ${state.step}`;
    if (timer) return; // a screen reader would read every frame
    const sentence =
      `Step ${state.step}. Without a clip: ${place(free)}, norm ${number(free.norm)}. ` +
      `Clipped to ${number(state.limit)}: ${place(clipped)}, norm ${number(clipped.norm)}.`;
    find("status").textContent = sentence;
    find("terrain").setAttribute("aria-label", `Loss over w and b with two paths. ${sentence}`);
    const fired = paths.clipped.slice(0, state.step + 1).filter((p) => p.factor < 1).length;
    const largest = (name) => Math.max(...paths[name].slice(0, state.step + 1).map((p) => p.norm));
    find("norms").setAttribute(
      "aria-label",
      `Gradient norms up to step ${state.step}. The largest: ${number(largest("free"))} without ` +
        `a clip, ${number(largest("clipped"))} with it. The clip fired at ${fired} of ` +
        `${state.step + 1} points.`,
    );
    const ends = Object.entries(norms).map(([name, list]) => `${name} ${number(list.at(-1))}`);
    find("jacobians").setAttribute(
      "aria-label",
      `Norms of products of Jacobians, ρ ${number(state.rho)}, after ${state.T} steps back: ` +
        `${ends.join(", ")}.`,
    );
  }

  function draw() {
    if (state.view === "map") drawMap(find("terrain"));
    else drawSurface(find("terrain"));
    drawNorms(find("norms"));
    drawJacobians(find("jacobians"));
    describe();
  }

  let timer = 0;
  function pause() {
    clearInterval(timer);
    timer = 0;
  }

  function play() {
    if (timer) {
      pause();
      change({});
      return;
    }
    timer = setInterval(() => {
      if (state.step + 1 >= STEPS) pause();
      change({ step: state.step + 1 }, { remember: !timer });
    }, 160);
    change({ step: state.step === STEPS ? 0 : state.step }, { remember: false });
  }

  find("step").addEventListener("input", pause);
  find("play").addEventListener("click", play);
  find("step-once").addEventListener("click", () => {
    pause();
    change({ step: state.step + 1 });
  });
  find("reset").addEventListener("click", () => {
    pause();
    change({ step: 0 });
  });
  find("crest").addEventListener("click", () => change({ b: crest(startW(), state.T) }));
  find("defaults").addEventListener("click", () => {
    pause();
    change(tab.defaults);
  });

  let held = null;
  find("terrain").addEventListener("pointerdown", (event) => {
    if (state.view !== "surface") return;
    held = { x: event.clientX, turn: state.turn };
    event.target.setPointerCapture(event.pointerId);
  });
  find("terrain").addEventListener("pointermove", (event) => {
    if (!held) return;
    const turned = held.turn + (event.clientX - held.x) / 2;
    change({ turn: ((((turned + 180) % 360) + 360) % 360) - 180 });
  });
  for (const end of ["pointerup", "pointercancel"]) {
    find("terrain").addEventListener(end, () => (held = null));
  }
  find("terrain").addEventListener("click", (event) => {
    if (state.view !== "map") return;
    const { left, top } = event.target.getBoundingClientRect();
    const box = mapBox(event.target.clientWidth, event.target.clientHeight);
    const [px, py] = [event.clientX - left, event.clientY - top];
    if (px < box.left || px > box.right || py < box.top || py > box.bottom) return;
    const region = shown();
    const w = scale([box.left, box.right], region.w)(px);
    const b = scale([box.bottom, box.top], region.b)(py);
    // ρ in the steps of its slider.
    const rho = Math.round((w * SLOPE) / 0.005) * 0.005;
    change({ rho: Number(rho.toFixed(3)), b: Number(b.toFixed(4)) });
  });

  window.playground = {
    sigmoid, loss, gradient, clipFactor, descend, cliff, crest, spectralNorm, jacobians, tab, paths,
  };
})();
