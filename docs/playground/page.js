// What the tabs of the playground share: settings that the address holds, and drawing.
"use strict";

(() => {
  const find = (id) => document.getElementById(id);

  // Numbers as text.

  const SUPERSCRIPT = { "-": "⁻", ..."⁰¹²³⁴⁵⁶⁷⁸⁹" };
  const minus = (text) => text.replace("-", "−");
  const brief = (value, digits = 12) => minus(String(Number(value.toPrecision(digits))));
  const power = (exponent) => `10${[...String(exponent)].map((c) => SUPERSCRIPT[c]).join("")}`;

  /** Four digits, with a power of ten where the number is large or small. */
  function number(value) {
    if (!Number.isFinite(value)) return minus(String(value));
    if (Number.isInteger(value) && Math.abs(value) < 1e5) return minus(String(value));
    const exponent = Math.floor(Math.log10(Math.abs(value)));
    if (exponent >= -3 && exponent < 5) return minus(value.toPrecision(4));
    const digits = (value / 10 ** exponent).toFixed(2);
    return Number.isFinite(Number(digits)) ? `${minus(digits)}·${power(exponent)}` : String(value);
  }

  // Drawing.

  const colors = {};
  function readColors() {
    const style = getComputedStyle(document.documentElement);
    const names = [
      "paper", "ink", "faint", "grid", "free", "clipped", "rotation", "tanh", "shear", "unit",
      "low", "middle", "high", "contour",
    ];
    for (const name of names) colors[name] = style.getPropertyValue(`--${name}`).trim();
  }

  /** A context in CSS pixels, cleared, sharp on every screen. */
  function prepare(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    context.lineJoin = "round";
    context.textBaseline = "middle";
    context.texts = []; // the places that are taken, for `write`
    return { context, width, height };
  }

  const scale = ([from, to], [low, high]) => (value) =>
    low + ((value - from) / (to - from)) * (high - low);

  function ticks([low, high], count) {
    const raw = (high - low) / count;
    const ten = 10 ** Math.floor(Math.log10(raw));
    const step = ten * [1, 2, 5, 10].find((factor) => factor * ten >= raw);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  function line(context, points, { color, width = 2, dash = [] }) {
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.strokeStyle = color;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.stroke();
    context.setLineDash([]);
  }

  /** Circles for the clipped path, squares for the other: color is not the only difference. */
  function marker(context, [x, y], { color, square, size = 3, hollow = false }) {
    context.beginPath();
    if (square) context.rect(x - size, y - size, 2 * size, 2 * size);
    else context.arc(x, y, size, 0, 2 * Math.PI);
    context.fillStyle = hollow ? colors.paper : color;
    context.fill();
    context.lineWidth = 1.5;
    context.strokeStyle = hollow ? color : colors.paper;
    context.stroke();
  }

  /**
   * Text inside the canvas that covers no earlier text: it moves to the first free one of `moves`,
   * in pixels downwards, or is left out.
   */
  function write(context, text, x, y, options = {}) {
    const { align = "left", color = colors.ink, halo = false, moves = [0] } = options;
    const width = context.measureText(text).width;
    const wanted = x - width * { left: 0, center: 0.5, right: 1 }[align];
    const left = Math.max(1, Math.min(context.canvas.clientWidth - width - 1, wanted));
    for (const move of moves) {
      const [top, bottom] = [y + move - 6.5, y + move + 6.5];
      const place = { left: left - 3, right: left + width + 3, top, bottom };
      const covers = (other) =>
        place.left < other.right && other.left < place.right &&
        place.top < other.bottom && other.top < place.bottom;
      if (top < -1 || bottom > context.canvas.clientHeight + 1) continue;
      if (context.texts.some(covers)) continue;
      context.texts.push(place);
      context.textAlign = "left";
      if (halo) {
        context.lineWidth = 4;
        context.strokeStyle = colors.paper;
        context.strokeText(text, left, y + move);
      }
      context.fillStyle = color;
      context.fillText(text, left, y + move);
      return;
    }
  }

  /** Axes with powers of ten upwards; `floor` is where smaller values, and 0, are drawn. */
  function logAxes(canvas, values, { last, floor, xLabel, margin = 12 }) {
    const { context, width, height } = prepare(canvas);
    const box = { left: 52, right: width - margin, top: 12, bottom: height - 40 };
    const usable = values.filter((value) => value > 0 && Number.isFinite(value));
    const exponents = usable.map(Math.log10);
    const least = Math.floor(Math.min(0, ...exponents));
    const low = Math.max(floor, values.includes(0) ? least - 1 : least);
    const below = values.filter((value) => value < 10 ** low);
    const high = Math.max(low + 2, Math.ceil(Math.max(0, ...exponents) + 0.15));
    const x = scale([0, last], [box.left, box.right]);
    const upwards = scale([low, high], [box.bottom, box.top]);
    // What is not finite is drawn at the upper edge.
    const y = (value) =>
      upwards(Number.isNaN(value) ? high : Math.min(high, Math.max(low, Math.log10(value))));
    if (below.length) {
      const text = below.some((value) => value > 0) ? `≤ ${power(low)}` : "0";
      write(context, text, box.left - 6, box.bottom, { align: "right" });
    }
    const each = Math.max(1, Math.ceil((high - low) / 7));
    for (let exponent = high; exponent >= low; exponent -= 1) {
      if (exponent % each) continue;
      const at = upwards(exponent);
      line(context, [[box.left, at], [box.right, at]], { color: colors.grid, width: 1 });
      write(context, power(exponent), box.left - 6, at, { align: "right" });
    }
    for (const value of ticks([0, last], width < 420 ? 5 : 8)) {
      write(context, brief(value), x(value), box.bottom + 13, { align: "center" });
    }
    write(context, xLabel, (box.left + box.right) / 2, box.bottom + 30, { align: "center" });
    return { context, box, x, y };
  }

  // Tabs and their settings.

  const tabs = {};
  let current = null;

  /**
   * A tab: `state` holds its settings, which start from `defaults` and are shown by the inputs whose
   * ids are `prefix` and the name. `update` computes anew after a change, `draw` draws.
   */
  function tab(name, { prefix = "", ranges, choices = {}, whole = [], logarithmic = [], ...rest }) {
    const { defaults, update, draw, follow = () => {}, hide = () => {} } = rest;
    const state = { ...defaults };
    const input = (setting) => find(prefix + setting);

    /** Takes over what is valid; says what is used in place of the rest. */
    function accept(changes) {
      const notes = [];
      for (const [setting, value] of Object.entries(changes)) {
        const list = choices[setting];
        if (list?.includes(value)) state[setting] = value;
        if (list && state[setting] !== value) {
          const rule = `${setting} must be ${list.join(" or ")}`;
          notes.push(`${rule}, got ${value}: ${state[setting]} is used.`);
        }
        if (!(setting in ranges)) continue;
        const given = String(value).trim() === "" ? NaN : Number(value);
        const [low, high] = ranges[setting];
        if (!Number.isNaN(given)) {
          const inside = Math.min(high, Math.max(low, given));
          state[setting] = whole.includes(setting) ? Math.round(inside) : inside;
        }
        if (state[setting] === given) continue;
        const what = input(setting).labels[0].textContent;
        const rule = whole.includes(setting) ? "a whole number from" : "from";
        const got = Number.isNaN(given) ? `“${value}”` : value;
        const [least, most, seen, used] = [low, high, got, state[setting]].map((x) => minus(String(x)));
        notes.push(`${what} must be ${rule} ${least} to ${most}, got ${seen}: ${used} is used.`);
      }
      return notes;
    }

    function show() {
      for (const setting of Object.keys(ranges)) {
        const element = input(setting);
        const value = state[setting];
        element.value = logarithmic.includes(setting) ? Math.log10(value) : value;
        if (element.type !== "range") continue;
        find(`${prefix}${setting}-value`).textContent = brief(value, 4);
        element.setAttribute("aria-valuetext", brief(value, 4));
      }
      for (const setting of Object.keys(choices)) {
        input(`${setting}-${state[setting]}`).checked = true;
      }
    }

    function change(changes, { remember = true } = {}) {
      const before = { ...state };
      const notes = accept(changes);
      follow(before, changes);
      find("note").textContent = notes.join(" ");
      show();
      if (current !== self) return;
      update(changes);
      if (remember) writeAddress();
      redraw();
    }

    const address = () => {
      const pairs = Object.entries(state).map((pair) => pair.join("="));
      return `#${[...(name === Object.keys(tabs)[0] ? [] : [`tab=${name}`]), ...pairs].join("&")}`;
    };
    const reset = () => Object.assign(state, defaults);

    for (const setting of Object.keys(ranges)) {
      const element = input(setting);
      element.addEventListener(element.type === "range" ? "input" : "change", () => {
        const value = logarithmic.includes(setting)
          ? Number((10 ** element.value).toPrecision(3))
          : element.value;
        change({ [setting]: value });
      });
    }
    for (const [setting, values] of Object.entries(choices)) {
      for (const value of values) {
        input(`${setting}-${value}`).addEventListener("change", () => change({ [setting]: value }));
      }
    }
    const self = { name, state, defaults, change, update, draw, hide, address, reset };
    tabs[name] = self;
    find(`tab-${name}`).addEventListener("click", () => open(self));
    find(`tab-${name}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const names = Object.keys(tabs);
      const by = event.key === "ArrowRight" ? 1 : names.length - 1;
      const next = names[(names.indexOf(name) + by) % names.length];
      find(`tab-${next}`).focus();
      open(tabs[next]);
    });
    return self;
  }

  function open(chosen, changes = {}, { remember = true } = {}) {
    if (current && current !== chosen) current.hide();
    current = chosen;
    for (const { name } of Object.values(tabs)) {
      find(name).hidden = name !== chosen.name;
      find(`tab-${name}`).setAttribute("aria-selected", name === chosen.name);
      find(`tab-${name}`).tabIndex = name === chosen.name ? 0 : -1;
    }
    chosen.change(changes, { remember });
  }

  let pending = 0;
  /** A little later: browsers refuse more than 100 changes of the address in half a minute. */
  function writeAddress() {
    clearTimeout(pending);
    pending = setTimeout(() => history.replaceState(null, "", current.address()), 300);
  }

  /** The tab and the settings of the address; what it does not hold is as at first. */
  function readAddress() {
    const { tab: name, ...given } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const chosen = tabs[name] ?? Object.values(tabs)[0];
    chosen.hide();
    chosen.reset();
    open(chosen, given, { remember: location.hash !== "" });
  }

  let frame = 0;
  /** Draws the open tab with the next frame. */
  function redraw() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      readColors();
      current.draw();
    });
  }

  document.addEventListener("DOMContentLoaded", readAddress);
  window.addEventListener("hashchange", readAddress);
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  window.page = {
    find, minus, brief, power, number, colors, prepare, scale, ticks, line, marker, write, logAxes, tab,
    redraw,
  };
})();
