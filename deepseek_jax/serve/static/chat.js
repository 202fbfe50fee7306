'use strict';
// The chat page. What a model writes is not trusted: it is set by textContent
// alone. The key lives in a variable and nowhere else.

const at = (id) => document.getElementById(id);
const log = at('log');
let key = '';
let model = null; // as /v1/models has it
let messages = []; // {role, content}
let running = null; // AbortController of the answer under way

function make(tag, kind, text) {
  const out = document.createElement(tag);
  if (kind) out.className = kind;
  if (text !== undefined) out.textContent = text;
  return out;
}

function button(text, act) {
  const out = make('button', '', text);
  out.type = 'button';
  out.addEventListener('click', act);
  return out;
}

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers['content-type'] = 'application/json';
  const response = await fetch(path, {
    method: body ? 'POST' : 'GET', headers, signal,
    body: body && JSON.stringify(body), cache: 'no-store',
  });
  if (response.ok) return response;
  let told = `error ${response.status}`;
  try { told = (await response.json()).error.message; } catch { /* no JSON */ }
  throw new Refused(told, response.status);
}

// Yields the JSON of server-sent events; an error among them is thrown.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused('the connection ended before the answer', 0);
    held += value;
    const parts = held.split('\n\n');
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith('data: ')) continue;
      const data = part.slice(6);
      if (data === '[DONE]') return;
      const found = JSON.parse(data);
      if (found.error) throw new Refused(found.error.message, 0);
      yield found;
    }
  }
}

async function connect() {
  try {
    model = (await (await ask('/v1/models')).json()).data[0];
  } catch (error) {
    if (error.status === 401) return lock();
    at('state').textContent = `${error.message}; trying again`;
    setTimeout(connect, 2000);
    return;
  }
  const can = model.capabilities;
  document.body.classList.toggle('no-chat', !can.chat);
  document.body.classList.toggle('no-think', !can.thinking);
  at('model').textContent = document.title = model.id;
  at('max_tokens').max = can.max_tokens;
  at('max_tokens').value = Math.min(at('max_tokens').value, can.max_tokens);
  const label = can.chat ? 'Message' : 'Beginning of a text';
  at('prompt-label').textContent = at('input').placeholder = label;
  ready();
  at('input').focus();
}

function lock() {
  if (key) at('lock-note').textContent = 'That key was not right.';
  key = '';
  at('key').value = '';
  at('lock').showModal();
}

async function ready() {
  try {
    await ask('/ready');
    at('state').textContent = `${model.max_model_len} tokens of context`;
  } catch {
    at('state').textContent = 'compiling …';
    setTimeout(ready, 1000);
  }
}

function settings() {
  const out = {
    model: model.id, stream: true, stream_options: { include_usage: true },
    expert_load: true,
  };
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
    if (at(name).value !== '') out[name] = Number(at(name).value);
  }
  const thinking = at('thinking').value;
  if (model.capabilities.thinking && thinking) out.thinking = { type: thinking };
  return out;
}

function body(text) {
  const out = settings();
  if (!model.capabilities.chat) return { ...out, prompt: text };
  const system = at('system').value.trim();
  const first = system ? [{ role: 'system', content: system }] : [];
  return { ...out, messages: [...first, ...messages] };
}

function nearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function follow(was) {
  if (was) log.scrollTop = log.scrollHeight;
}

function said(text) {
  const article = make('article', 'user');
  article.append(make('p', 'who', 'You'), make('div', 'text', text));
  log.append(article);
}

// One answer on the page, filled as it comes.
class Answer {
  constructor(beginning) {
    this.article = make('article', 'assistant');
    this.article.append(make('p', 'who', model.id));
    this.thought = make('details', 'thought');
    this.thought.append(make('summary', '', 'Thinking'), make('div', 'text'));
    this.thought.hidden = true;
    this.text = make('div', 'text');
    if (beginning) this.text.append(make('span', 'beginning', beginning));
    this.said = make('span', 'said');
    this.text.append(this.said);
    this.facts = make('p', 'facts');
    this.article.append(this.thought, this.text, this.facts);
    log.append(this.article);
    this.content = '';
    this.reasoning = '';
    this.calls = [];
    this.pieces = 0;
    this.asked = performance.now();
    this.first = 0;
  }

  take(chunk) {
    const choice = chunk.choices[0];
    if (choice) {
      const delta = choice.delta || { content: choice.text };
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        this.last = performance.now();
        this.first ||= this.last;
        this.pieces += 1;
      }
      this.reasoning += delta.reasoning_content || '';
      this.content += delta.content || '';
      for (const call of delta.tool_calls || []) this.call(call);
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.expert_load) this.load = chunk.expert_load;
    this.show();
  }

  call(call) {
    this.calls.push(call);
    const { name, arguments: given } = call.function;
    this.article.insertBefore(
      make('div', 'text call', `${name}(${given})`), this.facts);
  }

  show() {
    const was = nearEnd();
    this.said.textContent = this.content;
    this.thought.hidden = !this.reasoning;
    this.thought.lastChild.textContent = this.reasoning;
    const thinking = this.reasoning && !this.content && !this.finish;
    this.thought.firstChild.textContent = thinking ? 'Thinking …' : 'Thinking';
    this.facts.textContent = this.speed();
    follow(was);
  }

  // Every token but the first, over the time since the first.
  speed() {
    if (!this.first) return '';
    const tokens = this.usage ? this.usage.completion_tokens : this.pieces;
    const seconds = (this.last - this.first) / 1000;
    const rate = seconds > 0 ? (tokens - 1) / seconds : 0;
    const wait = ((this.first - this.asked) / 1000).toFixed(2);
    return `${tokens} tokens · ${rate.toFixed(1)} tokens/s · first after ${wait} s`;
  }

  end(error) {
    const was = nearEnd();
    if (this.finish === 'length') this.facts.append(make('span', '', 'cut at its length'));
    if (error) this.facts.append(make('span', 'wrong', error));
    if (this.load) heat(this);
    this.facts.append(
      button('Copy', () => navigator.clipboard?.writeText(this.content)));
    if (this.usage) {
      const left = model.max_model_len - this.usage.total_tokens;
      at('state').textContent = `${left} of ${model.max_model_len} tokens left`;
    }
    follow(was);
  }
}

// Draws tokens per layer and expert: a row for a layer, a column for an expert.
function heat(answer) {
  const { layers, experts, counts } = answer.load;
  const sums = counts.map((row) => row.reduce((a, b) => a + b, 0));
  const most = Math.max(1, ...counts.flat());
  const box = make('details', 'experts');
  const plural = layers === 1 ? 'layer' : 'layers';
  box.append(make('summary', '', `Experts: ${layers} ${plural} of ${experts}`));
  const canvas = make('canvas');
  const cell = 8;
  canvas.width = experts * cell;
  canvas.height = layers * cell;
  canvas.style.height = `${Math.max(48, layers * 8)}px`;
  const reading = make('p', 'reading');
  const tell = (row, column) => {
    const even = sums[row] / experts;
    const times = even ? (counts[row][column] / even).toFixed(1) : '0.0';
    return `layer ${row + 1}, expert ${column + 1}: ${counts[row][column]} tokens,`
      + ` ${times} times an even share`;
  };
  const busiest = [0, 0];
  counts.forEach((row, r) => row.forEach((n, c) => {
    if (n > counts[busiest[0]][busiest[1]]) busiest.splice(0, 2, r, c);
  }));
  const busy = `busiest: ${tell(...busiest)}`;
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', `Tokens per layer and expert; ${busy}`);
  reading.textContent = busy;
  const paint = () => {
    const brush = canvas.getContext('2d');
    brush.clearRect(0, 0, canvas.width, canvas.height);
    brush.fillStyle = getComputedStyle(document.body).getPropertyValue('--accent');
    counts.forEach((row, r) => row.forEach((n, c) => {
      brush.globalAlpha = n / most;
      brush.fillRect(c * cell, r * cell, cell, cell);
    }));
  };
  canvas.addEventListener('pointermove', (event) => {
    const column = Math.floor(event.offsetX / canvas.clientWidth * experts);
    const row = Math.floor(event.offsetY / canvas.clientHeight * layers);
    if (counts[row]?.[column] !== undefined) reading.textContent = tell(row, column);
  });
  canvas.addEventListener('pointerleave', () => { reading.textContent = busy; });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
  const holder = make('div', 'heat');
  holder.append(canvas);
  box.append(holder, reading);
  answer.article.insertBefore(box, answer.facts);
  paint();
}

function busy(is) {
  at('send').hidden = is;
  at('stop').hidden = !is;
}

async function send() {
  const text = at('input').value;
  if (!text.trim() || !model || running) return;
  const chat = model.capabilities.chat;
  const talk = messages; // `fresh` begins another
  if (chat) {
    said(text);
    talk.push({ role: 'user', content: text });
  }
  at('input').value = '';
  grow();
  const answer = new Answer(chat ? '' : text);
  log.scrollTop = log.scrollHeight;
  running = new AbortController();
  busy(true);
  let wrong = '';
  try {
    const path = chat ? '/v1/chat/completions' : '/v1/completions';
    const response = await ask(path, body(text), running.signal);
    for await (const chunk of events(response)) answer.take(chunk);
  } catch (error) {
    wrong = error.name === 'AbortError' ? 'stopped' : error.message;
    if (error.status === 401) lock();
  }
  running = null;
  busy(false);
  answer.end(wrong);
  if (chat && (answer.content || answer.calls.length)) {
    talk.push({ role: 'assistant', content: answer.content });
  } else if (chat) {
    // No answer: the question may be sent again.
    talk.pop();
    if (talk === messages) at('input').value ||= text;
    grow();
  }
  at('input').focus();
}

function stop() {
  if (running) running.abort();
}

function fresh() {
  stop();
  messages = [];
  log.replaceChildren();
  at('state').textContent = model ? `${model.max_model_len} tokens of context` : '';
  at('input').focus();
}

function adjust() {
  const hidden = !at('settings').hidden;
  at('settings').hidden = hidden;
  at('adjust').setAttribute('aria-expanded', String(!hidden));
  (hidden ? at('input') : at('temperature')).focus();
}

function grow() {
  const input = at('input');
  input.style.height = 'auto';
  input.style.height = `${input.scrollHeight + 2}px`;
}

at('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
at('input').addEventListener('input', grow);
at('input').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && running) stop();
  else if (event.altKey && event.code === 'KeyN') { event.preventDefault(); fresh(); }
  else if (event.altKey && event.code === 'KeyS') { event.preventDefault(); adjust(); }
});
at('stop').addEventListener('click', stop);
at('fresh').addEventListener('click', fresh);
at('adjust').addEventListener('click', adjust);
// Browsers let a second Esc close it all the same.
at('lock').addEventListener('cancel', (event) => event.preventDefault());
at('lock').addEventListener('close', () => { if (!key) at('lock').showModal(); });
at('unlock').addEventListener('submit', () => {
  key = at('key').value.trim();
  at('key').value = '';
  connect();
});
connect();
