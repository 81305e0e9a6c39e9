// The picture to start from: a drawing of joined strokes, a file, what is dropped or pasted, or the camera.
const sketch = $('sketch').getContext('2d', { willReadFrequently: true });
const small = document.createElement('canvas'), smallContext = small.getContext('2d', { alpha: false });
const pen = { changed: false, last: null, past: [], camera: null, capturing: false };
const BLANK = '#2040d0', LONGEST = 512, MOST_UNDO = 20;

async function capture(from) {                      // the newest state, while no more than two are unanswered
  if (pen.capturing || live.open >= 2 || !isOpen() || live.socket.bufferedAmount > 0) return;
  pen.capturing = true; pen.changed = false;
  const wide = from.videoWidth || from.width, high = from.videoHeight || from.height;
  if (wide && high) {
    cover(smallContext, from, wide, high);
    const blob = await new Promise(done => small.toBlob(done, 'image/jpeg', 0.85));
    if (blob && $('source').value !== 'none') await live.picture(blob);
  }
  pen.capturing = false;
}
function cover(context, from, wide, high) {         // what fills the canvas, of the middle
  const { width, height } = context.canvas, scale = Math.max(width / wide, height / high);
  const [w, h] = [width / scale, height / scale];
  context.drawImage(from, (wide - w) / 2, (high - h) / 2, w, h, 0, 0, width, height);
}
setInterval(() => {
  if ($('source').value === 'sketch' && pen.changed) capture($('sketch'));
  if ($('source').value === 'camera' && pen.camera) capture($('video'));
}, 16);

function fill() { sketch.fillStyle = BLANK; sketch.fillRect(0, 0, $('sketch').width, $('sketch').height); }
function shape(ratio) {                             // the drawing has the picture's shape
  const wide = Math.round(Math.min(LONGEST, LONGEST * ratio)), high = Math.round(Math.min(LONGEST, LONGEST / ratio));
  if ($('sketch').width === wide && $('sketch').height === high) return;
  const before = document.createElement('canvas');
  before.width = $('sketch').width; before.height = $('sketch').height;
  before.getContext('2d').drawImage($('sketch'), 0, 0);
  $('sketch').width = wide; $('sketch').height = high;
  cover(sketch, before, before.width, before.height);
  pen.past = [];
}
function remember() {
  pen.past.push(sketch.getImageData(0, 0, $('sketch').width, $('sketch').height));
  if (pen.past.length > MOST_UNDO) pen.past.shift();
}
function drawn() {
  pen.changed = true;
  store(STORE + '-drawing', $('sketch').toDataURL('image/jpeg', 0.9));
}
function at(event) {
  const box = $('sketch').getBoundingClientRect();
  return [(event.clientX - box.left) * $('sketch').width / box.width, (event.clientY - box.top) * $('sketch').height / box.height];
}
function stroke(event) {                            // from where the pointer was to where it is, with what lay between
  const between = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  sketch.strokeStyle = $('colour').value; sketch.lineCap = sketch.lineJoin = 'round';
  sketch.lineWidth = $('brush').value * Math.max($('sketch').width, $('sketch').height) / 256;
  sketch.beginPath(); sketch.moveTo(...(pen.last || at(event)));
  for (const point of between.length ? between : [event]) sketch.lineTo(...at(point));
  sketch.stroke();
  pen.last = at(event); pen.changed = true;
}
$('sketch').addEventListener('pointerdown', event => {
  $('sketch').setPointerCapture(event.pointerId);
  remember(); pen.last = null; stroke(event);
});
$('sketch').addEventListener('pointermove', event => { if (event.buttons && pen.last) stroke(event); });
for (const kind of ['pointerup', 'pointercancel']) $('sketch').addEventListener(kind, () => { if (pen.last) drawn(); pen.last = null; });
$('wipe').addEventListener('click', () => { remember(); fill(); drawn(); });
$('undo').addEventListener('click', () => {
  const before = pen.past.pop();
  if (before) { sketch.putImageData(before, 0, 0); drawn(); }
});

// a picture from outside lies on the drawing, and can be drawn on
async function take(blob) {
  if (!blob || !blob.type.startsWith('image/')) return says('that is no picture');
  try {
    const picture = await createImageBitmap(blob);
    remember(); cover(sketch, picture, picture.width, picture.height);
  } catch { return says('this picture cannot be read'); }
  if ($('source').value !== 'sketch') choose('sketch');
  drawn();
}
$('upload').addEventListener('click', () => $('file').click());
$('file').addEventListener('change', () => { take($('file').files[0]); $('file').value = ''; });
const carries = event => [...(event.dataTransfer || event.clipboardData).items].find(item => item.kind === 'file');
addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('over'); });
addEventListener('dragleave', event => { if (!event.relatedTarget) document.body.classList.remove('over'); });
addEventListener('drop', event => {
  event.preventDefault(); document.body.classList.remove('over');
  const item = carries(event);
  if (item) take(item.getAsFile());
});
addEventListener('paste', event => { const item = carries(event); if (item) { event.preventDefault(); take(item.getAsFile()); } });

// where pictures come from
function choose(source) { $('source').value = source; $('source').dispatchEvent(new Event('change')); }
$('source').addEventListener('change', async () => {
  const source = $('source').value;
  if (pen.camera) { pen.camera.getTracks().forEach(track => track.stop()); pen.camera = null; }
  $('input').hidden = source === 'none';
  $('sketch').hidden = $('tools').hidden = source === 'camera'; $('video').hidden = source !== 'camera';
  shown(); keep();
  if (source === 'none') send({ type: 'clear' });
  if (source === 'sketch') pen.changed = true;
  if (source !== 'camera') return;
  try {
    pen.camera = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480, facingMode: 'user' } });
    $('video').srcObject = pen.camera;
    await $('video').play();
  } catch (error) {
    choose('none');
    $('error').textContent = 'No camera: ' + (error.message || 'this page may not use one') + '.';
  }
});
async function resume() {                           // the drawing of the last visit
  const before = stored(STORE + '-drawing');
  if (typeof before === 'string' && before.startsWith('data:image/jpeg;base64,')) {
    const bytes = Uint8Array.from(atob(before.slice(23)), letter => letter.charCodeAt(0));
    try { const picture = await createImageBitmap(new Blob([bytes], { type: 'image/jpeg' })); cover(sketch, picture, picture.width, picture.height); }
    catch { /* it is drawn anew */ }
  }
  if ($('source').value !== 'none') choose($('source').value);
}
fill();
