// Settings: a change is sent at once, at most one a turn of the event loop, and kept for the next visit.
const number = id => Number($(id).value);
const read = {
  prompt: () => $('prompt').value, negative: () => $('negative').value || null, steps: () => number('steps'),
  guidance: () => number('guidance'), strength: () => number('strength'), noise: () => $('noise').value,
  seed: () => number('seed'), sampler: () => $('sampler').value || null, schedule: () => $('schedule').value || null,
  size: () => $('size').value ? $('size').value.split('x').map(Number) : null,
};
const OF_PRESETS = ['steps', 'guidance', 'sampler', 'schedule'];
const KEPT = [...Object.keys(read), 'source', 'colour', 'brush', 'preset'];
const stored = name => { try { return JSON.parse(localStorage.getItem(name)); } catch { return null; } };
function store(name, value) { try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* not kept then */ } }

function seedIsFine() {
  const seed = number('seed'), fine = $('seed').value !== '' && Number.isSafeInteger(seed) && seed >= 0;
  $('seed').setAttribute('aria-invalid', String(!fine));
  $('seed-note').textContent = fine ? '' : 'A seed is a whole number from 0 to 9007199254740991; the last one stays.';
  return fine;
}
function all() {
  const settings = Object.fromEntries(Object.entries(read).map(([name, value]) => [name, value()]));
  if (!seedIsFine()) delete settings.seed;
  return settings;
}
let changes = null;
function change(settings) {
  if (!changes) queueMicrotask(() => { live.set(changes); changes = null; });
  changes = Object.assign(changes || {}, settings);
}
function shown() {
  for (const id of ['steps', 'guidance', 'strength']) $(id + '-value').value = $(id).value;
  const idle = number('guidance') <= 1;
  $('negative').disabled = idle; $('negative-note').textContent = idle ? 'no effect at guidance 0 to 1' : '';
  $('strength').disabled = $('source').value === 'none';
  const [wide, high] = read.size() || [1, 1];
  document.documentElement.style.setProperty('--ratio', wide / high);
  small.width = wide; small.height = high;
  shape(wide / high);
  $('forget').hidden = !$('preset').value.startsWith('own:');
}
function keep() {
  const settings = Object.fromEntries(KEPT.map(id => [id, $(id).value]));
  if (settings.source === 'camera') settings.source = 'none';  // a camera is not switched on by itself
  store(STORE, { ...settings, bundle: live.hello && live.hello.bundle });
}
function put(id, value) {                            // where a select has no such entry it stays as it is
  const entry = $(id);
  if (entry.tagName !== 'SELECT' || [...entry.options].some(option => option.value === String(value))) entry.value = value;
}
for (const id of Object.keys(read)) $(id).addEventListener('input', () => {
  if (OF_PRESETS.includes(id)) $('preset').value = '';
  shown(); keep();
  if (id !== 'seed' || seedIsFine()) change({ [id]: read[id]() });
  if (id === 'size') pen.changed = true;
});
for (const id of ['colour', 'brush']) $(id).addEventListener('input', keep);
$('form').addEventListener('submit', event => event.preventDefault());
$('random').addEventListener('click', () => {
  $('seed').value = crypto.getRandomValues(new Uint32Array(1))[0];
  $('seed').dispatchEvent(new Event('input'));
});

// what the model offers, and what was set at the last visit
const option = (value, text) => Object.assign(document.createElement('option'), { value, textContent: text });
function offered(hello) {
  const kept = stored(STORE) || {}, same = kept.bundle === hello.bundle;
  $('size').replaceChildren(...hello.sizes.map(([w, h]) => option(w + 'x' + h, w + '×' + h)));
  $('size').value = hello.size.join('x');
  const named = names => names.map(name => option(name, name));
  $('sampler').append(group('suit this model', named(hello.samplers)), group('others', named(hello.other_samplers)));
  $('schedule').append(...named(hello.schedules));
  $('steps').value = Math.min(hello.defaults.steps, 4); $('guidance').value = hello.defaults.guidance;
  listPresets();
  for (const id of KEPT) if (kept[id] !== undefined && (same || !OF_PRESETS.includes(id) && id !== 'size')) put(id, kept[id]);
  shown(); resume();
}
function group(label, entries) {
  const made = Object.assign(document.createElement('optgroup'), { label });
  made.append(...entries);
  return made;
}
function listPresets() {
  const chosen = $('preset').value, own = Object.keys(stored(STORE + '-presets') || {});
  const groups = [option('', 'none')];
  if (live.hello.presets.length) groups.push(group('distilled models', live.hello.presets.map(p => option(p.name, p.name))));
  if (own.length) groups.push(group('yours', own.map(name => option('own:' + name, name))));
  $('preset').replaceChildren(...groups);
  put('preset', chosen);
}
function apply(settings) {
  for (const [id, value] of Object.entries(settings)) if (id in read || id === 'preset') put(id, value === null ? '' : value);
  shown(); keep(); change(all());
}
$('preset').addEventListener('input', () => {
  const name = $('preset').value, own = stored(STORE + '-presets') || {};
  const found = name.startsWith('own:') ? own[name.slice(4)] : live.hello.presets.find(p => p.name === name);
  if (found) {
    const { name: _, ...settings } = found;
    apply({ ...settings, preset: name });
  }
  shown(); keep();
});
$('remember').addEventListener('click', () => { $('preset-name').value = ''; $('naming').returnValue = ''; $('naming').showModal(); });
$('naming').addEventListener('close', () => {
  const name = $('preset-name').value.trim();
  if ($('naming').returnValue !== 'save' || !name) return;
  const settings = Object.fromEntries(Object.keys(read).filter(id => id !== 'size').map(id => [id, $(id).value]));
  store(STORE + '-presets', { ...stored(STORE + '-presets'), [name]: settings });
  listPresets(); put('preset', 'own:' + name); shown(); keep();
});
$('forget').addEventListener('click', () => {
  const own = stored(STORE + '-presets') || {};
  delete own[$('preset').value.slice(4)];
  store(STORE + '-presets', own);
  $('preset').value = ''; listPresets(); shown(); keep();
});
