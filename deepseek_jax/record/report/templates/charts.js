'use strict';
// Without this script the page shows everything but the inspector; with it one
// reads values: by a pointer, by touch, or with arrow keys where the focus is.
const find = (id) => document.getElementById(id);
for (const node of document.querySelectorAll('[data-needs-script]')) {
  node.hidden = false;
}

// Print what is folded.
addEventListener('beforeprint', () => {
  for (const node of document.querySelectorAll('details')) node.open = true;
});

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({length: bytes.length / 2}, (_, n) => view.getUint16(2 * n, true));
}

function clamp(n, count) {
  return Math.max(0, Math.min(count - 1, n));
}

function brief(value) {
  if (!Number.isFinite(value)) return 'none';
  // Steps are whole numbers, and told apart however many there are.
  return `${Math.abs(value) >= 1e4 ? Math.round(value) : Number(value.toPrecision(4))}`;
}

// What the recorder of the experts left; null of a run without any.
const routing = find('routing') && recorded(JSON.parse(find('routing').textContent));

function recorded(told) {
  const cells = told.first.length;
  const layers = told.layers.length;
  const {experts} = told;
  const arrays = told.arrays.map((array) => ({...array, codes: decode(array.data)}));
  const number = (array, code) => code === 65535 ? NaN : array.low + array.scale * code;
  const pairs = told.together && {...told.together, codes: decode(told.together.data)};
  // Where each cell begins and ends, as shares of the width.
  const span = told.last[cells - 1] - told.start;
  return {
    ...told, cells, arrays, pairs, layers, names: told.layers,
    bounds: [told.start, ...told.last].map((step) => (step - told.start) / span),
    at: (array, cell, layer, expert) =>
        number(array, array.codes[(cell * layers + layer) * experts + expert]),
    pair: (layer, one, other) =>
        number(pairs, pairs.codes[(layer * pairs.groups + one) * pairs.groups + other]),
    steps: (cell) => told.first[cell] === told.last[cell] ?
        `step ${told.last[cell]}` : `steps ${told.first[cell]}–${told.last[cell]}`,
  };
}

function onAxis(axis, value) {
  const scale = axis.log ? Math.log : (x) => x;
  return (scale(value) - scale(axis.low)) / (scale(axis.high) - scale(axis.low));
}

// What can be read of a chart: `near` finds the place [column, row] that a
// pointer means, `move` the one that an arrow leads to, `text` what is there.
function curvesOf({x, y, series}) {
  const places = series.map((one) => one.steps.map((step) => onAxis(x, step)));
  const heights = series.map((one) => one.mean.map((value) => onAxis(y, value)));
  const nearest = (row, share) => {
    let best = 0;
    places[row].forEach((place, n) => {
      if (Math.abs(place - share) < Math.abs(places[row][best] - share)) best = n;
    });
    return best;
  };
  const rows = series.map((one, n) => n).filter((n) => series[n].steps.length);
  const says = ({mean, low, high, steps}, n, step) => brief(mean[n]) +
      (low && low[n] !== high[n] ? ` (${brief(low[n])} to ${brief(high[n])})` : '') +
      (step !== steps[n] ? ` at ${brief(steps[n])}` : '');
  return {
    first: () => [places[rows[0]].length - 1, rows[0]],
    near: (across, up) => {
      const far = (row) => Math.abs(heights[row][nearest(row, across)] - up);
      const row = rows.reduce((a, b) => far(b) < far(a) ? b : a);
      return [nearest(row, across), row];
    },
    move: ([column, row], right, down) => {
      const next = rows[clamp(rows.indexOf(row) + down, rows.length)];
      const from = next === row ? column : nearest(next, places[row][column]);
      return [clamp(from + right, places[next].length), next];
    },
    spot: ([column, row]) =>
        ({left: places[row][column], top: 1 - heights[row][column], color: series[row].color}),
    text: ([column, row]) => {
      const step = series[row].steps[column];
      const shown = rows.length > 6 ? [row] : rows;
      return [{words: `step ${brief(step)}`}, ...shown.map((n) => ({
        label: series[n].label,
        words: says(series[n], nearest(n, places[row][column]), step),
        color: series[n].color,
        now: n === row && shown.length > 1,
      }))];
    },
  };
}

// The lines of a layer's experts, whose numbers the recorder's arrays hold.
function linesOf({array, layer, x, y}) {
  const held = routing.arrays.find((one) => one.name === array);
  const steps = routing.last;
  const series = Array.from({length: routing.experts}, (_, expert) => ({
    label: `expert ${expert}`, steps, color: 'var(--ink)',
    mean: steps.map((_, cell) => routing.at(held, cell, layer, expert)),
  }));
  return curvesOf({x, y, series});
}

function mapOf({map, layer}) {
  const load = routing.arrays.find((one) => one.name === 'load');
  const {experts, cells, bounds} = routing;
  const even = (count) => Array.from({length: count + 1}, (_, n) => n / count);
  // Neighbours among many experts stand together.
  const group = (n) => {
    const first = (m) => Math.ceil(m * experts / routing.pairs.groups);
    const [low, high] = [first(n), first(n + 1) - 1];
    return low === high ? `${low}` : `${low}–${high}`;
  };
  const kinds = {
    last: {
      across: even(experts), down: even(routing.layers),
      text: ([column, row]) => [
        `layer ${routing.names[row]}, expert ${column}`,
        `load / even share ${brief(routing.at(load, cells - 1, row, column))}`],
    },
    load: {
      across: bounds, down: even(experts),
      text: ([column, row]) => [
        `expert ${row}, ${routing.steps(column)}`,
        `load / even share ${brief(routing.at(load, column, layer, row))}`],
    },
    together: routing.pairs && {
      across: even(routing.pairs.groups), down: even(routing.pairs.groups),
      text: ([column, row]) => [
        `experts ${group(row)} and ${group(column)}`,
        `pairs / by chance ${brief(routing.pair(layer, row, column))}`],
    },
  };
  const {across, down, text} = kinds[map];
  const [columns, rows] = [across.length - 1, down.length - 1];
  const cell = (edges, share) => clamp(edges.findIndex((edge) => edge > share) - 1, edges.length - 1);
  return {
    first: () => [columns - 1, 0],
    near: (x, y) => [x >= 1 ? columns - 1 : cell(across, x), y <= 0 ? rows - 1 : cell(down, 1 - y)],
    move: ([column, row], right, lower) => [clamp(column + right, columns), clamp(row + lower, rows)],
    cell: ([column, row]) => ({
      left: across[column], top: down[row],
      width: across[column + 1] - across[column], height: down[row + 1] - down[row]}),
    text: (place) => text(place).map((words) => ({words})),
  };
}

function readable(area) {
  const told = JSON.parse(area.parentNode.querySelector('script').textContent);
  if (told.map ? !routing : !told.series.some((one) => one.steps.length)) return;
  // Made when it is first read: a large model has hundreds.
  let made;
  const chart = () => made ??=
      told.map === 'lines' ? linesOf(told) : told.map ? mapOf(told) : curvesOf(told);
  const marks = document.createElement('div');
  marks.hidden = true;
  area.append(marks);
  let place = null;
  const percent = (share) => `${100 * share}%`;
  const mark = (name, style) => {
    const node = document.createElement('div');
    node.className = name;
    Object.assign(node.style, style);
    return node;
  };

  function show(next) {
    place = next;
    const lines = chart().text(place);
    let shown;
    if (chart().cell) {
      const {left, top, width, height} = shown = chart().cell(place);
      marks.replaceChildren(mark('at cell', {
        left: percent(left), top: percent(top), width: percent(width), height: percent(height)}));
    } else {
      const {left, top, color} = shown = chart().spot(place);
      marks.replaceChildren(
          mark('at', {left: percent(left), top: 0, bottom: 0, width: '1px'}),
          mark('spot', {left: percent(left), top: percent(top), background: color}));
    }
    marks.hidden = false;
    area.setAttribute('aria-valuenow', Math.round(100 * shown.left));
    area.setAttribute('aria-valuetext', 
        lines.map(({label, words}) => label ? `${label}: ${words}` : words).join(', '));
    tip(area, shown.left + (shown.width || 0) / 2, lines);
  }
  function hide() {
    place = null;
    marks.hidden = true;
    find('tip').hidden = true;
  }
  const pointed = (event) => {
    const box = area.getBoundingClientRect();
    show(chart().near((event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height));
  };
  area.addEventListener('pointermove', pointed);
  area.addEventListener('pointerdown', pointed);
  area.addEventListener('pointerleave', (event) => {
    // A finger that is lifted leaves, too, but what it touched is to be read.
    if (event.pointerType === 'mouse') hide();
  });
  area.addEventListener('focus', () => {
    if (area.matches(':focus-visible')) show(place || chart().first());
  });
  area.addEventListener('blur', hide);
  area.addEventListener('keydown', (event) => {
    const far = event.shiftKey ? 10 : 1;
    const ways = {
      ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far],
      ArrowDown: [0, far], Home: [-1e9, 0], End: [1e9, 0],
    };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === 'Escape') hide();
    else if (event.key === 'PageDown') neighbour(area, 1);
    else if (event.key === 'PageUp') neighbour(area, -1);
    else if (ways[event.key]) show(chart().move(place || chart().first(), ...ways[event.key]));
    else return;
    event.preventDefault();
  });
  area.setAttribute('role', 'slider');
  area.setAttribute('aria-roledescription', 'chart');
  area.setAttribute('aria-valuenow', 100);
  area.setAttribute('aria-valuetext', 'arrow keys read values');
  area.tabIndex = -1;
}

// Tab stops once at every figure: its charts take turns.
const within = (area) => {
  const group = area.closest('.linear, .log, figure') || document;
  return [...group.querySelectorAll('.area[tabindex]')];
};

function neighbour(area, by) {
  const all = within(area);
  const next = all[clamp(all.indexOf(area) + by, all.length)];
  area.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  next.scrollIntoView({block: 'nearest'});
}

function tip(area, share, lines) {
  const box = area.getBoundingClientRect();
  const node = find('tip');
  node.replaceChildren(...lines.map(({label, words, color, now}) => {
    const line = document.createElement('p');
    if (color) {
      line.append(document.createElement('i'));
      line.firstChild.style.background = color;
    }
    if (label) {
      // A label that is written from right to left leaves the number alone.
      const name = document.createElement('bdi');
      name.append(label);
      line.append(name, ': ');
    }
    line.append(words);
    line.className = now ? 'now' : '';
    return line;
  }));
  node.hidden = false;
  const wide = document.documentElement.clientWidth;
  node.style.left = node.style.top = 0;
  const left = box.left + share * box.width - node.offsetWidth / 2;
  node.style.left = `${Math.max(8, Math.min(left, wide - node.offsetWidth - 8)) + scrollX}px`;
  // Above the chart; under it where the window ends.
  const above = box.top - node.offsetHeight - 6;
  node.style.top = `${(above < 0 ? box.bottom + 26 : above) + scrollY}px`;
}

for (const area of document.querySelectorAll('.area')) readable(area);
for (const area of document.querySelectorAll('.area[tabindex]')) {
  if (within(area)[0] === area) area.tabIndex = 0;
}
// Elsewhere is no chart: a finger there ends the reading.
addEventListener('pointerdown', (event) => {
  if (!event.target.closest('.area')) {
    for (const node of document.querySelectorAll('.area > div')) node.hidden = true;
    find('tip').hidden = true;
  }
});
