'use strict';
// Without this script the page shows everything but the inspector.
const find = (id) => document.getElementById(id);
for (const node of document.querySelectorAll('[data-needs-script]')) {
  node.hidden = false;
}

// Print what is folded.
addEventListener('beforeprint', () => {
  for (const node of document.querySelectorAll('details')) node.open = true;
});

if (find('log-x')) {
  find('log-x').addEventListener('change', (event) => {
    for (const node of document.querySelectorAll('.log, .linear')) {
      node.hidden = node.className === 'log' !== event.target.checked;
    }
  });
}

function inspect(run) {
  const cells = run.first.length;
  const experts = run.experts;
  const layers = run.layers.length;
  const arrays = run.arrays.map((array) => ({...array, codes: decode(array.data)}));
  const at = (array, cell, layer, expert) => {
    const code = array.codes[(cell * layers + layer) * experts + expert];
    return code === 65535 ? NaN : array.low + array.scale * code;
  };
  // Where each cell begins and ends, as shares of the width.
  const span = run.last[cells - 1] - run.start;
  const bounds = [run.start, ...run.last].map((step) => (step - run.start) / span);
  const state = {layer: 0, expert: busiest(), cell: cells - 1};

  const layerBox = find('layer');
  const expertBox = find('expert');
  run.layers.forEach((name, n) => layerBox.add(new Option(name, n)));
  for (let n = 0; n < experts; n++) expertBox.add(new Option(n, n));
  expertBox.value = state.expert;

  const map = plot('map', 'load / even share, one row per expert');
  const lines = arrays.map((array) => plot(array.name,
      array.name === 'load' ? 'load / even share' : array.name));

  const pairs = run.together && {...run.together, codes: decode(run.together.data)};
  const partners = pairs && plot('together', 'chosen with it / by chance, by expert');

  layerBox.addEventListener('change', () => {
    state.layer = Number(layerBox.value);
    draw();
  });
  expertBox.addEventListener('change', () => {
    state.expert = Number(expertBox.value);
    draw();
  });
  const point = (event, box) => {
    const x = (event.offsetX - box.left) / box.width;
    const y = (event.offsetY - box.top) / box.height;
    state.cell = clamp(bounds.findIndex((bound) => bound > x) - 1, cells);
    return clamp(Math.floor(y * experts), experts);
  };
  map.canvas.addEventListener('mousemove', (event) => read(point(event, map.box)));
  map.canvas.addEventListener('mouseleave', () => {
    state.cell = cells - 1;
    read(state.expert);
  });
  map.canvas.addEventListener('click', (event) => {
    state.expert = point(event, map.box);
    expertBox.value = state.expert;
    draw();
  });
  addEventListener('resize', draw);
  draw();

  function busiest() {
    const last = (expert) => at(arrays[0], cells - 1, 0, expert);
    let best = 0;
    for (let n = 1; n < experts; n++) if (last(n) > last(best)) best = n;
    return best;
  }

  function read(expert) {
    const values = arrays.map((array) => `${array.name} ${
        at(array, state.cell, state.layer, expert).toPrecision(4)}`);
    const [first, last] = [run.first[state.cell], run.last[state.cell]];
    const steps = first === last ? `step ${last}` : `steps ${first}–${last}`;
    find('reading').textContent =
        [`expert ${expert}`, steps, ...values].join(' · ');
  }

  function draw() {
    drawMap();
    lines.forEach((target, n) => drawLines(target, arrays[n]));
    if (pairs) drawPartners();
    read(state.expert);
  }

  function drawMap() {
    const array = arrays.find((a) => a.name === 'load') || arrays[0];
    const shade = array.name === 'load' ? [0, 2] : range(array);
    const context = start(map, [0, experts - 1], [run.start, run.last[cells - 1]]);
    const {left, top, width, height} = map.box;
    // One pixel per cell, enlarged: no seams.
    const small = document.createElement('canvas');
    small.width = cells;
    small.height = experts;
    const pixels = new ImageData(cells, experts);
    for (let cell = 0; cell < cells; cell++) {
      for (let expert = 0; expert < experts; expert++) {
        const value = at(array, cell, state.layer, expert);
        const color = viridis((value - shade[0]) / (shade[1] - shade[0] || 1));
        pixels.data.set([...color, 255], 4 * (expert * cells + cell));
      }
    }
    small.getContext('2d').putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    for (let cell = 0; cell < cells; cell++) {
      const [from, to] = [bounds[cell], bounds[cell + 1]].map((share) =>
          Math.round(left + width * share));
      context.drawImage(small, cell, 0, 1, experts, from, top, to - from, height);
    }
    const row = height / experts;
    context.strokeStyle = '#fff';
    context.lineWidth = 1.5;
    context.strokeRect(left, top + row * state.expert, width, Math.max(row, 3));
    context.fillStyle = '#c4512d';
    const middle = top + row * (state.expert + .5);
    context.beginPath();
    context.moveTo(left - 1, middle);
    context.lineTo(left - 9, middle - 5);
    context.lineTo(left - 9, middle + 5);
    context.fill();
  }

  function drawLines(target, array) {
    const [low, high] = range(array);
    const context = start(target, [high, low], [run.start, run.last[cells - 1]]);
    const {left, top, width, height} = target.box;
    // A value stands at its interval's end; a single one is a level.
    const xs = cells > 1 ? bounds.slice(1) : bounds;
    const trace = (expert) => {
      context.beginPath();
      xs.forEach((x, n) => {
        const value = at(array, Math.min(n, cells - 1), state.layer, expert);
        const share = high > low ? (value - low) / (high - low) : .5;
        context.lineTo(left + width * x, top + height * (1 - share));
      });
      context.stroke();
    };
    context.strokeStyle = 'rgb(110 120 135 / 22%)';
    context.lineWidth = 1;
    for (let expert = 0; expert < experts; expert++) trace(expert);
    context.strokeStyle = '#c4512d';
    context.lineWidth = 2;
    trace(state.expert);
  }

  // A bar for every group of experts: how often the expert's tokens choose it.
  function drawPartners() {
    const {groups} = pairs;
    const own = Math.floor(state.expert * groups / experts);
    const row = (state.layer * groups + own) * groups;
    const values = Array.from({length: groups}, (_, n) => {
      const code = pairs.codes[row + n];
      return code === 65535 ? 0 : pairs.low + pairs.scale * code;
    });
    const high = Math.max(2, ...values);
    const context = start(partners, [high, 0], [0, experts - 1], 'expert');
    const {left, top, width, height} = partners.box;
    values.forEach((value, n) => {
      context.fillStyle = value > 1 ? '#c4512d' : '#7fb0de';
      const tall = height * value / high;
      context.fillRect(left + width * n / groups, top + height - tall,
          Math.max(width / groups - 1, 1), tall);
    });
    const chance = top + height * (1 - 1 / high);
    context.beginPath();
    context.moveTo(left, chance);
    context.lineTo(left + width, chance);
    context.stroke();
  }

  function range(array) {
    let low = Infinity, high = -Infinity;
    for (let cell = 0; cell < cells; cell++) {
      for (let expert = 0; expert < experts; expert++) {
        const value = at(array, cell, state.layer, expert);
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    return low <= high ? [low, high] : [0, 0];
  }
}

// One canvas with room for its title and ends of both axes.
function plot(name, title) {
  const canvas = document.createElement('canvas');
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', title);
  find('plots').append(canvas);
  return {canvas, title, box: null};
}

function start(target, vertical, steps, unit = 'step') {
  const {canvas} = target;
  const size = canvas.getBoundingClientRect();
  const dense = devicePixelRatio || 1;
  canvas.width = size.width * dense;
  canvas.height = size.height * dense;
  target.box = {left: 46, top: 24, width: size.width - 52, height: size.height - 46};
  const {left, top, width, height} = target.box;
  const context = canvas.getContext('2d');
  context.scale(dense, dense);
  context.font = '12px ' + getComputedStyle(document.body).getPropertyValue('--sans');
  context.fillStyle = '#26292e';
  context.fillText(target.title, left, 14);
  context.fillStyle = '#565c66';
  context.fillText(brief(steps[0]), left, top + height + 16);
  context.textAlign = 'right';
  context.fillText(`${unit} ${brief(steps[1])}`, left + width, top + height + 16);
  context.fillText(brief(vertical[0]), left - 6, top + 9);
  context.fillText(brief(vertical[1]), left - 6, top + height);
  context.strokeStyle = '#9aa0a8';
  context.lineWidth = .7;
  context.strokeRect(left, top, width, height);
  return context;
}

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({length: bytes.length / 2}, (_, n) => view.getUint16(2 * n, true));
}

function clamp(n, count) {
  return Math.max(0, Math.min(count - 1, n));
}

function brief(value) {
  return Number(value.toPrecision(3)).toString();
}

// Nine points of matplotlib's viridis, straight lines between.
const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142],
  [33, 145, 140], [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37]];

function viridis(share) {
  if (Number.isNaN(share)) return [176, 180, 186];
  const place = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1);
  const n = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const [low, high] = [VIRIDIS[n], VIRIDIS[n + 1]];
  return low.map((a, i) => Math.round(a + (place - n) * (high[i] - a)));
}

if (find('routing')) inspect(JSON.parse(find('routing').textContent));
