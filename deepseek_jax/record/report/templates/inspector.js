
function inspect(run) {
  const {arrays, at, bounds, cells, experts, pairs} = run;
  const state = {layer: 0, expert: busiest(), cell: cells - 1};

  const layerBox = find('layer');
  const expertBox = find('expert');
  run.names.forEach((name, n) => layerBox.add(new Option(name, n)));
  for (let n = 0; n < experts; n++) expertBox.add(new Option(n, n));
  expertBox.value = state.expert;

  const map = plot('load / even share, one row per expert');
  const lines = arrays.map((array) =>
      plot(array.name === 'load' ? 'load / even share' : array.name));
  const partners = pairs && plot('chosen with it / by chance, by expert');

  layerBox.addEventListener('change', () => choose({layer: Number(layerBox.value)}));
  expertBox.addEventListener('change', () => choose({expert: Number(expertBox.value)}));
  const point = (event) => {
    const x = (event.offsetX - map.box.left) / map.box.width;
    const y = (event.offsetY - map.box.top) / map.box.height;
    state.cell = clamp(bounds.findIndex((bound) => bound > x) - 1, cells);
    if (x >= 1) state.cell = cells - 1;
    return clamp(Math.floor(y * experts), experts);
  };
  map.canvas.addEventListener('pointermove', (event) => read(point(event)));
  map.canvas.addEventListener('pointerleave', (event) => {
    if (event.pointerType === 'mouse') choose({cell: cells - 1});
  });
  map.canvas.addEventListener('click', (event) => choose({expert: point(event)}));
  map.canvas.tabIndex = 0;
  map.canvas.setAttribute('role', 'slider');
  map.canvas.setAttribute('aria-roledescription', 'map');
  map.canvas.setAttribute('aria-valuemin', 0);
  map.canvas.setAttribute('aria-valuemax', cells - 1);
  map.canvas.addEventListener('keydown', (event) => {
    const far = event.shiftKey ? 10 : 1;
    const {cell, expert, layer} = state;
    const ways = {
      ArrowLeft: {cell: cell - far}, ArrowRight: {cell: cell + far},
      ArrowUp: {expert: expert - far}, ArrowDown: {expert: expert + far},
      Home: {cell: 0}, End: {cell: cells - 1},
      PageUp: {layer: layer - 1}, PageDown: {layer: layer + 1},
    };
    if (event.altKey || event.ctrlKey || event.metaKey || !ways[event.key]) return;
    event.preventDefault();
    choose(ways[event.key]);
  });
  addEventListener('resize', draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  draw();

  function choose(change) {
    Object.assign(state, change);
    state.cell = clamp(state.cell, cells);
    state.expert = clamp(state.expert, experts);
    state.layer = clamp(state.layer, run.layers);
    layerBox.value = state.layer;
    expertBox.value = state.expert;
    draw();
  }

  function busiest() {
    const last = (expert) => at(arrays[0], cells - 1, 0, expert);
    let best = 0;
    for (let n = 1; n < experts; n++) if (last(n) > last(best)) best = n;
    return best;
  }

  function read(expert) {
    const values = arrays.map((array) =>
        `${array.name} ${brief(at(array, state.cell, state.layer, expert))}`);
    const words = [`expert ${expert}`, run.steps(state.cell), ...values].join(' · ');
    find('reading').textContent = words;
    map.canvas.setAttribute('aria-valuenow', state.cell);
    map.canvas.setAttribute('aria-valuetext', `layer ${run.names[state.layer]}, ${words}`);
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
    const {context, colors} = start(map, [0, experts - 1], [run.start, run.last[cells - 1]]);
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
    const place = (share) => Math.round(left + width * share);
    for (let cell = 0; cell < cells; cell++) {
      const [from, to] = [place(bounds[cell]), place(bounds[cell + 1])];
      context.drawImage(small, cell, 0, 1, experts, from, top, to - from, height);
    }
    const row = height / experts;
    context.strokeStyle = '#fff';
    context.lineWidth = 1.5;
    context.strokeRect(left, top + row * state.expert, width, Math.max(row, 3));
    const [from, to] = [place(bounds[state.cell]), place(bounds[state.cell + 1])];
    context.strokeRect(from, top, Math.max(to - from, 2), height);
    context.fillStyle = colors('--c1');
    const middle = top + row * (state.expert + .5);
    context.beginPath();
    context.moveTo(left - 1, middle);
    context.lineTo(left - 9, middle - 5);
    context.lineTo(left - 9, middle + 5);
    context.fill();
  }

  function drawLines(target, array) {
    const [low, high] = range(array);
    const {context, colors} = start(target, [high, low], [run.start, run.last[cells - 1]]);
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
    context.globalAlpha = .3;
    context.strokeStyle = colors('--axis');
    context.lineWidth = 1;
    for (let expert = 0; expert < experts; expert++) trace(expert);
    context.globalAlpha = 1;
    context.strokeStyle = colors('--c1');
    context.lineWidth = 2;
    trace(state.expert);
  }

  // A bar for every group of experts: how often the expert's tokens choose it.
  function drawPartners() {
    const {groups} = pairs;
    const own = Math.floor(state.expert * groups / experts);
    const values = Array.from({length: groups}, (_, n) => run.pair(state.layer, own, n) || 0);
    const high = Math.max(2, ...values);
    const {context, colors} = start(partners, [high, 0], [0, experts - 1], 'expert');
    const {left, top, width, height} = partners.box;
    values.forEach((value, n) => {
      context.fillStyle = colors(value > 1 ? '--c1' : '--c0');
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
function plot(title) {
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
  target.box = {left: 64, top: 24, width: size.width - 72, height: size.height - 46};
  const {left, top, width, height} = target.box;
  const style = getComputedStyle(document.documentElement);
  const colors = (name) => style.getPropertyValue(name).trim();
  const context = canvas.getContext('2d');
  context.scale(dense, dense);
  context.font = '12px ' + colors('--sans');
  context.fillStyle = colors('--ink');
  context.fillText(target.title, left, 14);
  context.fillStyle = colors('--soft');
  context.fillText(brief(steps[0]), left, top + height + 16);
  context.textAlign = 'right';
  context.fillText(`${unit} ${brief(steps[1])}`, left + width, top + height + 16);
  context.fillText(brief(vertical[0]), left - 10, top + 10);
  context.fillText(brief(vertical[1]), left - 10, top + height);
  context.strokeStyle = colors('--axis');
  context.lineWidth = 1;
  context.strokeRect(left, top, width, height);
  return {context, colors};
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

if (routing && routing.arrays.length) inspect(routing);
