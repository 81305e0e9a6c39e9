// The socket: what is said to the server, what comes back, and the state of it in words.
const PICTURE = 1, FRAME = 2, UNCHANGED = 3, HEAD = 24, STORE = 'fewstep-live';
const live = {
  socket: null, hello: null, next: 1, frames: 0, last: 0, shownAt: 0, latencies: [], marks: [], open: 0, errors: [],
  onframe: null, settings: null, commands: null, setId: 0, jpeg: null,
};
window.live = live;
const screen2 = $('picture').getContext('bitmaprenderer');

const isOpen = () => live.socket !== null && live.socket.readyState === 1;
function send(message) {
  if (!isOpen()) return 0;
  message.id = live.next++; message.at = performance.now();
  live.socket.send(JSON.stringify(message));
  return message.id;
}
live.set = settings => send({ type: 'set', settings });
live.picture = async blob => {                      // an input picture: header, then the file
  const file = new Uint8Array(await blob.arrayBuffer());
  if (!isOpen()) return 0;
  const bytes = new Uint8Array(16 + file.length), view = new DataView(bytes.buffer), id = live.next++;
  view.setUint8(0, PICTURE); view.setUint8(1, 1); view.setUint32(4, id, true); view.setFloat64(8, performance.now(), true);
  bytes.set(file, 16);
  live.socket.send(bytes); live.open++;
  return id;
};

async function onmessage(event) {
  if (typeof event.data === 'string') return onsaid(JSON.parse(event.data));
  const view = new DataView(event.data), kind = view.getUint8(0), index = view.getUint32(4, true), id = view.getUint32(8, true);
  const at = view.getFloat64(16, true);
  live.open = Math.max(0, live.open - 1);
  if (kind === UNCHANGED) return;
  const jpeg = new Blob([new Uint8Array(event.data, HEAD)], { type: 'image/jpeg' });
  const bitmap = await createImageBitmap(jpeg), canvas = $('picture');
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width; canvas.height = bitmap.height;
  }
  canvas.classList.toggle('small', bitmap.width <= 128);
  screen2.transferFromImageBitmap(bitmap);
  if (isOpen()) live.socket.send('{"type":"ack","frame":' + index + '}');
  const now = live.shownAt = performance.now();
  live.jpeg = jpeg;
  live.frames++;
  live.marks.push(now);
  if (live.marks.length > 4096) live.marks.splice(0, 2048);
  if (id > live.last) {                             // the first frame that shows this input
    live.last = id;
    live.latencies.push(now - at);
    if (live.latencies.length > 4096) live.latencies.splice(0, 2048);
  }
  if (live.onframe) live.onframe(id, now - at);
}

function onsaid(message) {
  if (message.type === 'hello') {
    const first = live.hello === null;
    live.hello = message;
    $('bundle').textContent = message.bundle;
    $('door').hidden = true;
    if (first) offered(message);
    $('error').textContent = '';
    change(all());
    if ($('source').value === 'sketch') pen.changed = true;
  } else if (message.type === 'set') {
    $('error').textContent = '';
    $('warning').textContent = message.warnings.map(text => text.replace(/\.?$/, '.')).join(' ');
    live.settings = message.settings; live.commands = message.commands; live.setId = message.id;
  } else if (message.type === 'error') {
    live.errors.push(message);
    if (live.errors.length > 100) live.errors.shift();
    live.open = 0;
    const words = [message.message + (message.expected ? '; expected ' + message.expected : ''), message.remedy];
    $('error').textContent = words.filter(Boolean).map(text => text.replace(/\.?$/, '.')).join(' ');
  }
}

const CLOSED = {
  1001: 'the service is ending', 1006: 'no connection', 1008: 'refused: too many messages',
  1009: 'refused: the picture is too large', 1011: 'the engine has failed', 1012: 'the service is starting again',
  1013: 'no place is free, or the model is still being loaded', 4408: 'ended after ten minutes of silence',
};
function tell(words, kind) {
  if ($('state').textContent === words) return;
  $('state').textContent = words; $('state').dataset.kind = kind;
}

function token() {
  return new URLSearchParams(location.hash.slice(1)).get('token') || sessionStorage.getItem(STORE + '-token');
}
function connect() {
  const secret = token(), wanted = ['fewstep-live-1'];
  if (secret) {
    const bytes = String.fromCharCode(...new TextEncoder().encode(secret));
    wanted.push('fewstep-token.' + btoa(bytes).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', ''));
  }
  const socket = live.socket = new WebSocket(location.origin.replace(/^http/, 'ws') + '/live/socket', wanted);
  socket.binaryType = 'arraybuffer';
  socket.onmessage = onmessage;
  socket.onclose = async event => {
    live.open = 0; live.last = 0;
    if (event.code === 1006 && await asksForToken(secret)) return;
    const why = (CLOSED[event.code] || 'the connection has ended') + (event.reason ? ' (' + event.reason + ')' : '');
    tell(why + '; trying again', 'bad');
    setTimeout(connect, 2000);
  };
}
async function asksForToken(secret) {                // a handshake that is refused says no more than that
  try {
    const headers = secret ? { authorization: 'Bearer ' + secret } : {};
    if ((await fetch('/v1/models', { headers })).status !== 401) return false;
  } catch { return false; }
  tell(secret ? 'this token is not known here' : 'waiting for a token', 'bad');
  $('door').hidden = false; $('token').focus();
  return true;
}
$('door').addEventListener('submit', event => {
  event.preventDefault();
  sessionStorage.setItem(STORE + '-token', $('token').value);
  if (location.hash) history.replaceState(null, '', location.pathname);
  connect();
});
