// The label picker (label_picker.py). props.value: class numbers, and words that are no name; props.names: all names.
const MAX_SHOWN = 200, NUM_NEAR = 5, LEAST_LIKENESS = 0.3;
const chips = element.querySelector('.mt-chips'), box = element.querySelector('input');
const popup = element.querySelector('.mt-options'), note = popup.querySelector('p'), list = popup.querySelector('ul');
let lower = [], active = -1;

const make = (tag, options) => Object.assign(document.createElement(tag), options);
const nameOf = (value) => (typeof value === 'number' ? props.names[value] ?? `class ${value}` : value);

function numberOf(text) {  // of a name, or of a number as text; -1 if it is neither
  const word = text.trim().toLowerCase(), found = lower.indexOf(word);
  if (found >= 0) return lower.indexOf(word, found + 1) < 0 ? found : -1;
  return /^\d+$/.test(word) && Number(word) < lower.length ? Number(word) : -1;
}

function choose(values) {
  props.value = values;
  draw();
  trigger('input');
}

function add(text) {
  const number = numberOf(text), value = number < 0 ? text.trim() : number;
  box.value = '';
  close();
  if (value !== '' && !props.value.includes(value)) choose([...props.value, value]);
}

function draw() {
  lower = props.names.map((name) => name.toLowerCase());
  chips.querySelectorAll('.mt-chip').forEach((chip) => chip.remove());
  props.value.forEach((value, index) => {
    const chip = make('span', {className: 'mt-chip', title: nameOf(value)});
    if (typeof value !== 'number') Object.assign(chip, {className: 'mt-chip unknown', title: 'This generator has no such label'});
    const remove = make('button', {type: 'button', textContent: '×'});
    remove.dataset.i = index;
    remove.setAttribute('aria-label', `Remove ${nameOf(value)}`);
    chip.append(make('span', {textContent: nameOf(value)}), remove);
    box.before(chip);
  });
  box.placeholder = props.value.length ? 'add another' : 'any: the model chooses';
}

// Numbers of the classes that match: the whole name, its beginning, the beginning of a word in it, anything else.
function matches(word) {
  const ranks = [[], [], [], []];
  lower.forEach((name, number) => {
    if (!name || props.value.includes(number)) return;
    const at = name.indexOf(word);
    if (at < 0) return;
    const startsWord = [' ', '-', '&', '(', '.'].some((before) => name.includes(before + word));
    ranks[name === word ? 0 : at === 0 ? 1 : startsWord ? 2 : 3].push(number);
  });
  return word ? ranks.flat() : ranks.flat().sort((a, b) => a - b);
}

function nearest(word) {  // by the pairs of letters that they share
  const pairs = (text) => new Set([...` ${text}`].map((letter, index) => letter + (text[index] ?? ' ')));
  const own = pairs(word);
  const likeness = (name) => {
    const other = pairs(name);
    return (2 * [...own].filter((pair) => other.has(pair)).length) / (own.size + other.size);
  };
  const scored = lower.map((name, number) => [likeness(name), number]).filter(([score]) => score > LEAST_LIKENESS);
  return scored.sort((a, b) => b[0] - a[0]).slice(0, NUM_NEAR).map(([, number]) => number);
}

function open() {
  const word = box.value.trim().toLowerCase();
  let found = matches(word), text = '';
  const isNear = word && !found.length;
  if (isNear) {
    found = nearest(word);
    text = found.length ? 'No such label. Near:' : 'No such label.';
  } else if (found.length > MAX_SHOWN) {
    text = `${found.length} labels: type to search`;
  }
  note.textContent = text;
  note.hidden = !text;
  list.replaceChildren(...found.slice(0, MAX_SHOWN).map((number, index) => {
    const option = make('li', {id: `${list.id}-${index}`});
    option.setAttribute('role', 'option');
    option.dataset.number = number;
    const name = props.names[number], at = word ? lower[number].indexOf(word) : -1;
    if (at < 0) option.textContent = name;
    else option.append(name.slice(0, at), make('b', {textContent: name.slice(at, at + word.length)}), name.slice(at + word.length));
    return option;
  }));
  popup.hidden = !found.length && !text;
  box.setAttribute('aria-expanded', String(!popup.hidden));
  point(word && !isNear ? 0 : -1);
  list.scrollTop = 0;
}

function close() {
  popup.hidden = true;
  box.setAttribute('aria-expanded', 'false');
  point(-1);
}

function point(index) {  // at an option; -1: at none
  list.children[active]?.setAttribute('aria-selected', 'false');
  active = list.children[index] && !popup.hidden ? index : -1;
  const option = list.children[active];
  if (!option) return box.removeAttribute('aria-activedescendant');
  option.setAttribute('aria-selected', 'true');
  box.setAttribute('aria-activedescendant', option.id);
  option.scrollIntoView({block: 'nearest'});
}

function pick(option) {
  box.value = '';
  close();
  choose([...props.value, Number(option.dataset.number)]);
}

box.addEventListener('input', open);
box.addEventListener('click', open);
box.addEventListener('keydown', (event) => {
  if (event.key === 'Enter') {
    if (active >= 0) pick(list.children[active]);
    else if (box.value.trim()) add(box.value);
    else { close(); trigger('submit'); }
  } else if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    if (popup.hidden) open();
    else point(Math.min(Math.max(active + (event.key === 'ArrowDown' ? 1 : -1), 0), list.children.length - 1));
  } else if (event.key === 'Backspace' && !box.value && props.value.length) {
    choose(props.value.slice(0, -1));
  } else if (event.key === 'Escape' && !popup.hidden) {
    event.stopPropagation();  // the list closes; a run goes on
    close();
  } else return;
  if (event.key !== 'Backspace') event.preventDefault();
});
// A word that was typed counts, also when the next thing is a click on Generate.
box.addEventListener('blur', () => { if (box.value.trim()) add(box.value); else close(); });
popup.addEventListener('mousedown', (event) => event.preventDefault());  // the box keeps the focus
list.addEventListener('click', (event) => {
  const option = event.target.closest('li');
  if (option) pick(option);
});
chips.addEventListener('click', (event) => {
  const remove = event.target.closest('button');
  if (remove) choose(props.value.filter((_, index) => index !== Number(remove.dataset.i)));
  if (!event.target.closest('.mt-chip')) box.focus();
});
watch(['value', 'names'], draw);
draw();
