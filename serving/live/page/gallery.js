// The last pictures, each with its settings and the command that makes it again.
const MOST_KEPT = 24, STILL_MS = 1000;
const shelf = { entries: [], shown: null, last: null };

function says(words) {
  $('told').textContent = words;
  clearTimeout(says.timer);
  says.timer = setTimeout(() => { $('told').textContent = ''; }, 4000);
}
const command = () => (live.commands || {})[$('source').value === 'none' ? 'noise' : 'picture'] || '';
const moves = () => $('noise').value !== 'fixed';
function download(blob, name) {
  const link = document.createElement('a'), url = URL.createObjectURL(blob);
  link.href = url; link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
const named = settings => 'fewstep-' + settings.prompt.toLowerCase().replace(/[^a-z0-9]+/g, '-').slice(0, 40) + '-' + settings.seed + '.jpg';
async function copied(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* a page without TLS may not */ }
  const area = document.createElement('textarea');
  area.value = text; ($('kept').open ? $('kept') : document.body).append(area); area.select();
  const done = document.execCommand('copy');
  area.remove();
  return done;
}
async function copyCommand(text, tell) {
  if (!text) return tell('there is no picture yet');
  tell(await copied(text) ? 'the command is copied' : 'the browser does not let this page copy');
}

function add() {
  if (!live.jpeg || !live.settings || live.jpeg === shelf.last) return false;
  const settings = { ...live.settings, source: $('source').value };
  const entry = { jpeg: live.jpeg, url: URL.createObjectURL(live.jpeg), command: command(), settings, moves: moves() };
  shelf.last = live.jpeg;
  shelf.entries.unshift(entry);
  while (shelf.entries.length > MOST_KEPT) URL.revokeObjectURL(shelf.entries.pop().url);
  list();
  return true;
}
function list() {
  const width = $('picture').width;
  $('gallery').replaceChildren(...shelf.entries.map(entry => {
    const item = document.createElement('li'), button = document.createElement('button'), image = new Image();
    image.src = entry.url; image.alt = entry.settings.prompt + ', seed ' + entry.settings.seed; image.className = width <= 128 ? 'small' : '';
    button.type = 'button'; button.append(image); button.addEventListener('click', () => open(entry));
    item.append(button);
    return item;
  }));
  $('shelf-empty').hidden = shelf.entries.length > 0;
}
function open(entry) {
  shelf.shown = entry;
  $('kept-picture').src = entry.url; $('kept-picture').alt = entry.settings.prompt;
  $('kept-picture').className = $('picture').width <= 128 ? 'small' : '';
  $('kept-command').textContent = entry.command;
  const from = entry.settings.source === 'none' ? '' : 'It was made from a picture: put that one into input.jpg. ';
  $('kept-note').textContent = from + (entry.moves ? 'Its noise was moving: the command makes the picture of the seed.' : '');
  $('kept').showModal();
}
// a picture that stands still for a while is kept, once
setInterval(() => {
  const still = live.jpeg && live.last >= live.setId && performance.now() - live.shownAt > STILL_MS;
  if (still && isOpen() && !moves() && $('source').value !== 'camera') add();
}, 250);

$('save').addEventListener('click', () => live.jpeg && live.settings ? download(live.jpeg, named(live.settings)) : says('there is no picture yet'));
$('keep').addEventListener('click', () => says(add() ? 'kept' : shelf.last ? 'it is kept already' : 'there is no picture yet'));
$('copy').addEventListener('click', () => copyCommand(live.jpeg ? command() : '', says));
$('full').addEventListener('click', async () => {
  try { await $('result').requestFullscreen(); } catch { says('the browser does not let this page fill the screen'); }
});
$('kept-copy').addEventListener('click', () => copyCommand(shelf.shown.command, words => { $('kept-note').textContent = words; }));
$('kept-save').addEventListener('click', () => download(shelf.shown.jpeg, named(shelf.shown.settings)));
$('kept-use').addEventListener('click', () => {
  const { size, source, ...settings } = shelf.shown.settings;
  apply({ ...settings, ...(size ? { size: size.join('x') } : {}), preset: '' });
  $('kept').close();
});
$('kept-start').addEventListener('click', () => { take(shelf.shown.jpeg); $('kept').close(); });
$('kept-drop').addEventListener('click', () => {
  shelf.entries = shelf.entries.filter(entry => entry !== shelf.shown);
  URL.revokeObjectURL(shelf.shown.url);
  list(); $('kept').close();
});
$('kept-close').addEventListener('click', () => $('kept').close());

// figures and the state in words, twice a second
const quantile = (sorted, q) => sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))].toFixed(1) : '–';
setInterval(() => {
  const since = performance.now() - 2000, recent = live.marks.filter(mark => mark > since);
  $('fps').textContent = recent.length ? (recent.length / 2).toFixed(recent.length < 4 ? 1 : 0) : '–';
  const sorted = live.latencies.slice(-256).sort((a, b) => a - b);
  $('p50').textContent = quantile(sorted, .5); $('p99').textContent = quantile(sorted, .99);
  if (isOpen() && live.hello) tell(recent.length ? 'making pictures' : 'ready: nothing has changed', recent.length ? 'busy' : 'ready');
}, 500);
connect();
