"use strict";
// Point clouds on plain 2D canvases: each point is a small square, nearer ones over farther ones.
const clouds = { turn: { yaw: 0.35, pitch: -0.2, zoom: 1 }, views: [], frame: 0 };

/** Depths of a grid from base64; formula in report_pictures.py. 0 = no point. */
function decodeGrid(cloud, name) {
  const bytes = Uint8Array.from(atob(cloud.grids[name]), (letter) => letter.charCodeAt(0));
  const codes = new DataView(bytes.buffer);
  const step = Math.log(cloud.far / cloud.near) / 65534;
  return Float32Array.from({ length: bytes.length / 2 }, (_, number) => {
    const code = codes.getUint16(2 * number, true);
    return code ? cloud.near * Math.exp((code - 1) * step) : 0;
  });
}

/** Colours of the grid's cells, RGBA, from the address of a picture. */
async function gridColors(cloud, source) {
  const picture = Object.assign(new Image(), { src: source }); // one of the page's may be lazy and never load
  await picture.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: cloud.cols, height: cloud.rows });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, cloud.cols, cloud.rows);
  return new Uint32Array(context.getImageData(0, 0, cloud.cols, cloud.rows).data.buffer);
}

/** Points (x, y, z, size) in camera coordinates: x to the right, y down, z ahead; `size` is the width of a cell there. */
function backProject(cloud, depths, colors) {
  const [fx, fy, cx, cy] = cloud.intrinsics;
  const points = { position: [], colors: [] };
  for (let cell = 0; cell < depths.length; cell++) {
    const z = depths[cell];
    if (!z) continue;
    const [row, col] = [Math.floor(cell / cloud.cols), cell % cloud.cols];
    points.position.push(((col + 0.5 - cx) / fx) * z, ((row + 0.5 - cy) / fy) * z, z, z / fx);
    points.colors.push(colors[cell]);
  }
  return { position: Float32Array.from(points.position), colors: Uint32Array.from(points.colors), cloud };
}

function drawCloud(canvas, points) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer);
  const nearest = new Float32Array(width * height).fill(Infinity);
  const { cloud, position, colors } = points;
  const { yaw, pitch, zoom } = clouds.turn;
  const [sinYaw, cosYaw, sinPitch, cosPitch] = [Math.sin(yaw), Math.cos(yaw), Math.sin(pitch), Math.cos(pitch)];
  const distance = cloud.middle / zoom;
  // Unturned and at zoom 1 the view is the photograph's, with its width or height fitted to the canvas.
  const focal = cloud.intrinsics[0] * Math.min(width / cloud.cols, height / cloud.rows);
  for (let point = 0; point < colors.length; point++) {
    const [x, y, z] = [position[4 * point], position[4 * point + 1], position[4 * point + 2] - cloud.middle];
    const turned = z * cosYaw - x * sinYaw;
    const depth = y * sinPitch + turned * cosPitch + distance;
    if (depth < 0.02 * cloud.middle) continue;
    const scale = focal / depth;
    const size = Math.min(Math.max(Math.ceil(1.15 * position[4 * point + 3] * scale), ratio), 7 * ratio);
    const left = Math.round(width / 2 + (x * cosYaw + z * sinYaw) * scale - size / 2);
    const top = Math.round(height / 2 + (y * cosPitch - turned * sinPitch) * scale - size / 2);
    for (let row = Math.max(top, 0); row < Math.min(top + size, height); row++) {
      for (let col = Math.max(left, 0); col < Math.min(left + size, width); col++) {
        const place = row * width + col;
        if (depth >= nearest[place]) continue;
        nearest[place] = depth;
        pixels[place] = colors[point];
      }
    }
  }
  context.putImageData(picture, 0, 0);
}

function drawClouds() {
  cancelAnimationFrame(clouds.frame);
  clouds.frame = requestAnimationFrame(() => {
    for (const { canvas, points } of clouds.views) drawCloud(canvas, points);
  });
}

function turnBy(yaw, pitch, zoom = 1) {
  const { turn } = clouds;
  turn.yaw += yaw;
  turn.pitch = Math.min(Math.max(turn.pitch + pitch, -1.5), 1.5);
  turn.zoom = Math.min(Math.max(turn.zoom * zoom, 0.2), 8);
  drawClouds();
}

function resetClouds() {
  Object.assign(clouds.turn, { yaw: 0.35, pitch: -0.2, zoom: 1 });
  drawClouds();
}

const KEYS = {
  ArrowLeft: [0.12, 0], ArrowRight: [-0.12, 0], ArrowUp: [0, 0.12], ArrowDown: [0, -0.12],
  "+": [0, 0, 1.15], "=": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
};

function listen(canvas) {
  const pointers = new Map();
  const gapOf = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y);
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const gapBefore = pointers.size === 2 ? gapOf([...pointers.values()]) : 0;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (gapBefore) turnBy(0, 0, gapOf([...pointers.values()]) / gapBefore);
    else turnBy(-(event.clientX - before.x) / 150, (event.clientY - before.y) / 150);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return; // else the page scrolls
    event.preventDefault();
    turnBy(0, 0, Math.exp(-event.deltaY / 600));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "0") resetClouds();
    else if (KEYS[event.key]) turnBy(...KEYS[event.key]);
    else return;
    event.preventDefault();
  });
}
