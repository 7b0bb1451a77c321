// A recurrent network on the temporal-order task, trained with back-propagation through time.
//
// The task and the network are those of examples/papers/temporal_order.py, after Pascanu, Mikolov, Bengio
// 2013 (https://arxiv.org/abs/1211.5063): two symbols, A or B each, are hidden among distractors,
// and the last state says which they were and in which order: AA, AB, BA or BB. Everything is
// float64. This file needs no page: `require("./rnn.js")` in Node sets the same global `rnn`.
"use strict";

(() => {
  const SYMBOLS = 6; // A, B and four distractors
  const CLASSES = 4;

  /** Uniform numbers in [0, 1) from a 32-bit seed (mulberry32). */
  function uniform(seed) {
    let state = seed | 0;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let x = Math.imul(state ^ (state >>> 15), state | 1);
      x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
      return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** One normal number (Box, Muller 1958). */
  const normal = (random) =>
    Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

  /** `count` sequences: symbols[t * count + k], and a class for each sequence k. */
  function sequences(random, length, count) {
    const below = (n) => Math.floor(random() * n);
    const symbols = Uint8Array.from({ length: length * count }, () => 2 + below(SYMBOLS - 2));
    const classes = Uint8Array.from({ length: count }, (_, k) => {
      const [first, second] = [below(2), below(2)];
      const tenth = Math.floor(length / 10);
      symbols[(tenth + below(tenth)) * count + k] = first;
      symbols[(Math.floor(length / 2) + below(tenth)) * count + k] = second;
      return 2 * first + second;
    });
    return { symbols, classes };
  }

  /** The largest modulus of an eigenvalue, ‖Aᵏ‖^(1/k) for k = 2²⁰ (Gelfand 1941). */
  function spectralRadius(matrix, n) {
    let power = matrix;
    let log = 0; // of the factor that was divided out of matrix ** (2 ** k), over 2 ** k
    for (let k = 0; k <= 20; k++) {
      const size = norm(power);
      if (!(size > 0 && size < Infinity)) return size;
      log += Math.log(size) / 2 ** k;
      const unit = power.map((value) => value / size);
      power = new Float64Array(n * n);
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < n; j++) {
          const factor = unit[i * n + j];
          for (let l = 0; l < n; l++) power[i * n + l] += factor * unit[j * n + l];
        }
      }
    }
    return Math.exp(log);
  }

  /** The Euclidean norm, whose squares neither overflow nor underflow. */
  function norm(values) {
    let largest = 0;
    for (const value of values) largest = Math.max(largest, Math.abs(value));
    if (!(largest > 0 && largest < Infinity)) return largest;
    let sum = 0;
    for (const value of values) sum += (value / largest) ** 2;
    return largest * Math.sqrt(sum);
  }

  /** min(1, limit / norm); 0 where the norm is not finite, as `clip_by_global_norm` does. */
  function clipFactor(size, limit) {
    if (!Number.isFinite(size)) return 0;
    return size > limit ? limit / size : 1;
  }

  /** The weights of a network: views of one array, each row by row. */
  function views(flat, units) {
    const arrays = {
      input: SYMBOLS * units, recurrent: units * units, bias: units,
      output: units * CLASSES, outputBias: CLASSES,
    };
    let from = 0;
    for (const [name, size] of Object.entries(arrays)) {
      arrays[name] = flat.subarray(from, from + size);
      from += size;
    }
    return arrays;
  }

  /** Weights from N(0, 0.1²), the recurrent ones scaled to the spectral radius; biases 0. */
  function initialize(random, units, radius) {
    const size = SYMBOLS * units + units ** 2 + units + units * CLASSES + CLASSES;
    const flat = new Float64Array(size);
    const { input, recurrent, output } = views(flat, units);
    for (const part of [input, recurrent, output]) {
      for (let i = 0; i < part.length; i++) part[i] = 0.1 * normal(random);
    }
    const factor = radius / spectralRadius(recurrent, units);
    for (let i = 0; i < recurrent.length; i++) recurrent[i] *= factor;
    return flat;
  }

  /** Mean cross-entropy of a batch, its gradient, and how many sequences are classified wrongly. */
  function gradient(flat, units, { symbols, classes }) {
    const count = classes.length;
    const length = symbols.length / count;
    const { input, recurrent, bias, output, outputBias } = views(flat, units);
    const grads = new Float64Array(flat.length);
    const of = views(grads, units);

    // Forward: states[(t + 1) * count + k] is tanh of what reaches the units at time t.
    const states = new Float64Array((length + 1) * count * units);
    for (let row = 0; row < length * count; row++) {
      const [before, after, symbol] = [row * units, (row + count) * units, symbols[row] * units];
      for (let i = 0; i < units; i++) {
        let sum = input[symbol + i] + bias[i];
        for (let j = 0; j < units; j++) sum += states[before + j] * recurrent[j * units + i];
        states[after + i] = Math.tanh(sum);
      }
    }

    // The loss, and its derivative with respect to the last states.
    let [loss, errors] = [0, 0];
    const back = new Float64Array(count * units);
    const last = length * count * units;
    for (let k = 0; k < count; k++) {
      const logits = outputBias.slice();
      for (let i = 0; i < units; i++) {
        for (let c = 0; c < CLASSES; c++) {
          logits[c] += states[last + k * units + i] * output[i * CLASSES + c];
        }
      }
      const highest = Math.max(...logits);
      const sum = logits.reduce((total, logit) => total + Math.exp(logit - highest), 0);
      loss += (highest + Math.log(sum) - logits[classes[k]]) / count;
      errors += logits[classes[k]] >= highest ? 0 : 1; // NaN is an error
      for (let c = 0; c < CLASSES; c++) {
        const slope = (Math.exp(logits[c] - highest) / sum - (c === classes[k])) / count;
        of.outputBias[c] += slope;
        for (let i = 0; i < units; i++) {
          of.output[i * CLASSES + c] += states[last + k * units + i] * slope;
          back[k * units + i] += output[i * CLASSES + c] * slope;
        }
      }
    }

    // Backward: `back` is the derivative with respect to the states of time t, one row per sequence.
    const inner = new Float64Array(units); // with respect to what is inside tanh
    for (let row = length * count - 1; row >= 0; row--) {
      const [before, after, symbol] = [row * units, (row + count) * units, symbols[row] * units];
      const from = (row % count) * units;
      for (let i = 0; i < units; i++) {
        inner[i] = back[from + i] * (1 - states[after + i] ** 2);
        of.bias[i] += inner[i];
        of.input[symbol + i] += inner[i];
      }
      for (let j = 0; j < units; j++) {
        const state = states[before + j];
        let sum = 0;
        for (let i = 0; i < units; i++) {
          of.recurrent[j * units + i] += state * inner[i];
          sum += recurrent[j * units + i] * inner[i];
        }
        back[from + j] = sum;
      }
    }
    return { loss, grads, errors };
  }

  /** One step of gradient descent, in place; a limit of null leaves the clip out. */
  function step(flat, units, batch, { limit, rate }) {
    const { loss, grads, errors } = gradient(flat, units, batch);
    const size = norm(grads);
    const factor = limit === null ? 1 : clipFactor(size, limit);
    // Zero times infinity would be NaN.
    if (factor > 0) for (let i = 0; i < flat.length; i++) flat[i] -= rate * factor * grads[i];
    return { loss, norm: size, factor, errors };
  }

  globalThis.rnn = {
    uniform, sequences, spectralRadius, norm, views, initialize, gradient, step,
  };
})();
