// Viewers of shapes that share one camera (studio_shapes_views.py). props.value: the GLB files of each canvas by its
// data-file, the frame [x, y, z, scale] that brings them into the box, hints for canvases without a file, a line of
// notes. What is shown stays until the next file is here, and the camera stays for good.
const FIRST = {turn: 0.6, lift: 0.35, distance: 5}, FIELD = 0.62 /* of view, radians */, NEAR = 0.1, FAR = 30;
const camera = {...FIRST};

const VERTEX = `#version 300 es
in vec3 place;
uniform mat4 view, projection;
out vec3 seen;
void main() {
  vec4 p = view * vec4(place, 1.0);
  seen = p.xyz;
  gl_Position = projection * p;
}`;
// Flat faces, lit from both sides: meshes of the world do not agree on where their faces look.
const FRAGMENT = `#version 300 es
precision highp float;
in vec3 seen;
out vec4 colour;
void main() {
  vec3 normal = normalize(cross(dFdx(seen), dFdy(seen)));
  float lamp = max(dot(normal, normalize(vec3(-0.4, 0.7, 0.6))), 0.0);
  float fill = max(dot(normal, normalize(vec3(0.7, -0.2, 0.5))), 0.0);
  colour = vec4(vec3(0.62, 0.72, 0.77) * (0.3 + 0.72 * lamp + 0.16 * fill), 1.0);
}`;

class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.name = canvas.dataset.file;
    this.hint = canvas.parentElement.querySelector('.mt-hint');
    this.note = canvas.parentElement.querySelector('small');
    this.url = this.mesh = null;
    canvas.addEventListener('webglcontextlost', (event) => event.preventDefault());
    canvas.addEventListener('webglcontextrestored', () => { this.prepare(); if (this.mesh) this.fill(); draw(); });
    this.prepare();
  }

  prepare() {
    const gl = this.gl = this.canvas.getContext('webgl2', {antialias: true, alpha: true});
    if (!gl) return;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    const place = gl.getAttribLocation(program, 'place');
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
    this.view = gl.getUniformLocation(program, 'view');
    this.projection = gl.getUniformLocation(program, 'projection');
  }

  fill() {
    const gl = this.gl;
    if (!gl || gl.isContextLost()) return;
    gl.bufferData(gl.ARRAY_BUFFER, this.mesh.places, gl.STATIC_DRAW);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, this.mesh.corners, gl.STATIC_DRAW);
  }

  async show(file, frame, hint) {
    const url = this.url = file ? file.url : null;
    let mesh = null;
    try {
      if (url) mesh = readGlb(await (await fetch(url)).arrayBuffer(), frame);
    } catch (error) {
      hint = 'The file of this shape is gone; make it again.';
    }
    if (url !== this.url) return;  // a newer one came meanwhile
    this.mesh = mesh;
    if (mesh) this.fill();
    if (mesh && !this.gl) hint = 'This browser draws nothing in 3D (WebGL 2 is off). The files can be downloaded.';
    this.hint.textContent = mesh && this.gl ? '' : hint || '';
    const faces = mesh ? mesh.corners.length / 3 : 0;
    this.note.textContent = mesh ? `${faces.toLocaleString('en')} faces` : '';
    this.canvas.dataset.faces = faces;
    const name = this.canvas.getAttribute('aria-label').split(':')[0];
    this.canvas.setAttribute('aria-label', `${name}: ${mesh ? `${faces} faces; arrow keys turn it` : 'nothing yet'}`);
    draw();
  }

  draw() {
    const {gl, canvas} = this, sharp = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * sharp), height = Math.round(canvas.clientHeight * sharp);
    if (!gl || !width || !height || gl.isContextLost()) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!this.mesh) return;
    gl.uniformMatrix4fv(this.view, false, viewMatrix());
    gl.uniformMatrix4fv(this.projection, false, projectionMatrix(width / height));
    gl.drawElements(gl.TRIANGLES, this.mesh.corners.length, gl.UNSIGNED_INT, 0);
  }
}

// Files of ours have one mesh and no transforms.
function readGlb(buffer, [x, y, z, scale]) {
  const head = new DataView(buffer), length = head.getUint32(12, true);
  const gltf = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const part = gltf.meshes[0].primitives[0];
  const array = (index, size) => {
    const accessor = gltf.accessors[index], bytes = gltf.bufferViews[accessor.bufferView];
    const start = 28 + length + (bytes.byteOffset || 0) + (accessor.byteOffset || 0);
    const Kind = {5121: Uint8Array, 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array}[accessor.componentType];
    const count = accessor.count * size;
    return new Kind(buffer.slice(start, start + count * Kind.BYTES_PER_ELEMENT));
  };
  const places = array(part.attributes.POSITION, 3), centre = [x, y, z];
  for (let i = 0; i < places.length; i++) places[i] = (places[i] - centre[i % 3]) / scale;
  return {places, corners: Uint32Array.from(array(part.indices, 1))};
}

function viewMatrix() {  // y is up; columns after one another
  const {turn, lift, distance} = camera;
  const [s, c, v, w] = [Math.sin(turn), Math.cos(turn), Math.sin(lift), Math.cos(lift)];
  return [c, -s * v, s * w, 0, 0, w, v, 0, -s, -c * v, c * w, 0, 0, 0, -distance, 1];
}

function projectionMatrix(aspect) {  // the whole box is seen in tall viewers, too
  const down = 1 / Math.tan(FIELD / 2) * Math.min(aspect, 1), deep = 1 / (NEAR - FAR);
  return [down / aspect, 0, 0, 0, 0, down, 0, 0, 0, 0, (FAR + NEAR) * deep, -1, 0, 0, 2 * FAR * NEAR * deep, 0];
}

const viewers = [...element.querySelectorAll('canvas')].map((canvas) => new Viewer(canvas));
let asked = false;

function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; for (const viewer of viewers) viewer.draw(); });
}

function move(turn, lift, zoom = 1) {
  camera.turn += turn;
  camera.lift = Math.max(-1.5, Math.min(1.5, camera.lift + lift));
  camera.distance = Math.max(1.5, Math.min(15, camera.distance * zoom));
  draw();
}

function follow() {
  const {files, frame, hints, notes} = props.value;
  for (const viewer of viewers) viewer.show(files[viewer.name], frame, hints[viewer.name]);
  const line = element.querySelector('.mt-notes');
  line.textContent = line.title = notes;
}

// One finger or the mouse turns, two fingers zoom.
const down = new Map();
const spread = () => {
  const [a, b] = [...down.values()];
  return Math.hypot(a.x - b.x, a.y - b.y);
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  event.target.setPointerCapture(event.pointerId);
  down.set(event.pointerId, {x: event.clientX, y: event.clientY});
});
element.addEventListener('pointermove', (event) => {
  const last = down.get(event.pointerId);
  if (!last) return;
  const before = down.size === 2 ? spread() : 0, [x, y] = [event.clientX - last.x, event.clientY - last.y];
  down.set(event.pointerId, {x: event.clientX, y: event.clientY});
  if (down.size === 2) move(0, 0, before / Math.max(spread(), 1));
  else move(-0.01 * x, 0.01 * y);
});
for (const name of ['pointerup', 'pointercancel']) {
  element.addEventListener(name, (event) => down.delete(event.pointerId));
}
element.addEventListener('wheel', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  event.preventDefault();
  move(0, 0, Math.exp(0.001 * event.deltaY));
}, {passive: false});
element.addEventListener('dblclick', () => { Object.assign(camera, FIRST); draw(); });
element.addEventListener('keydown', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  const step = {
    ArrowLeft: [0.15, 0], ArrowRight: [-0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15],
    '+': [0, 0, 0.85], '-': [0, 0, 1 / 0.85],
  }[event.key];
  if (event.key === 'Home') Object.assign(camera, FIRST);
  else if (!step) return;
  event.preventDefault();
  move(...(step || [0, 0]));
});
new ResizeObserver(draw).observe(element);
watch('value', follow);
follow();
