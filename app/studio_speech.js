// Players over a picture of their sound, or over a transcript (studio_speech_views.py). props.value.files: by the
// data-file of an audio element. All players of one element share a position: going from one to the other compares.
let moving = false;

const players = () => [...element.querySelectorAll('audio')];
const figure = () => element.querySelector('.mt-sound');
const current = () => players().find((audio) => audio.src && !audio.paused) ?? recent ?? players().find((audio) => audio.src);
let recent = null;

function fill() {
  recent = null;
  for (const audio of players()) {
    const file = props.value.files[audio.dataset.file];
    if (file) audio.src = file.url;
  }
  show(0);
}

function show(time) {
  const sound = figure();
  if (sound) {
    const total = Number(sound.dataset.seconds) || 1;
    sound.style.setProperty('--at', Math.min(time / total, 1));
    sound.setAttribute('aria-valuenow', time.toFixed(2));
    sound.setAttribute('aria-valuetext', `${time.toFixed(1)} s`);
  }
  let now = null;
  for (const word of element.querySelectorAll('.mt-word')) {
    const isNow = time >= Number(word.dataset.start) && time < Number(word.dataset.end);
    word.classList.toggle('now', isNow);
    if (isNow) now = word;
  }
  const list = element.querySelector('.mt-transcript');
  if (now && list) {  // the list scrolls, the page does not
    const place = now.getBoundingClientRect(), frame = list.getBoundingClientRect();
    if (place.top < frame.top || place.bottom > frame.bottom) list.scrollTop += place.top - frame.top - frame.height / 3;
  }
}

function follow() {  // more often than timeupdate, which comes four times a second
  const audio = players().find((one) => !one.paused);
  if (!audio) { moving = false; return; }
  show(audio.currentTime);
  requestAnimationFrame(follow);
}

function seek(time, andPlay = false) {
  const audio = current();
  if (!audio) return;
  audio.currentTime = Math.max(0, Math.min(time, audio.duration || time));
  show(audio.currentTime);
  if (andPlay) audio.play();
}

function shareOf(event) {  // where in the lanes a pointer is, 0 to 1
  const lane = element.querySelector('.mt-drawn').getBoundingClientRect();
  return Math.max(0, Math.min((event.clientX - lane.left) / lane.width, 1));
}

// Media events do not bubble; they are seen on their way down.
element.addEventListener('play', (event) => {
  const audio = event.target, other = players().find((one) => one !== audio && !one.paused);
  if (other) {
    audio.currentTime = other.currentTime;
    other.pause();
  } else if (recent && recent !== audio && audio.currentTime === 0 && !recent.ended) {
    audio.currentTime = recent.currentTime;
  }
  recent = audio;
  if (!moving) { moving = true; requestAnimationFrame(follow); }
}, true);
element.addEventListener('timeupdate', (event) => {
  const playing = players().find((one) => !one.paused);
  if (!playing || playing === event.target) show(event.target.currentTime);
}, true);
element.addEventListener('pointerdown', (event) => {
  if (!figure() || !event.target.closest('.mt-drawn')) return;
  seek(shareOf(event) * Number(figure().dataset.seconds));
});
element.addEventListener('click', (event) => {
  const place = event.target.closest('[data-start]');
  if (place) seek(Number(place.dataset.start), true);
});
element.addEventListener('keydown', (event) => {
  const audio = current();
  if (!audio || !event.target.closest('.mt-sound')) return;
  const step = {ArrowRight: 0.5, ArrowLeft: -0.5, Home: -1e9, End: 1e9}[event.key];
  if (step !== undefined) seek(audio.currentTime + step);
  else if (event.key === ' ') audio.paused ? audio.play() : audio.pause();
  else return;
  event.preventDefault();
});
watch('value', fill);
fill();
