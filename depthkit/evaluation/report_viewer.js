"use strict";
const viewer = { picture: 0, slider: find("#slider") };

/** The pictures of an image that the slider can show: [start of the element's id, what it is]. */
const layers = [
  ["image", "image"],
  ["target", "ground truth"],
  ...page.models.map((model, number) => [`aligned/${number}`, model]),
  ...page.models.map((model, number) => [`error/${number}`, `error of ${model}`]),
];

function layerElement(layer) {
  const [name, model] = layer.split("/");
  return find(`#${[name, viewer.picture, model].filter((part) => part !== undefined).join("-")}`);
}

function showSlider() {
  const chosen = ["#left", "#right"].map((id) => find(id).value);
  for (const [number, name] of [".over", ".under"].entries()) {
    const shown = find(name, viewer.slider);
    shown.src = layerElement(chosen[number]).src;
    shown.alt = layers.find(([layer]) => layer === chosen[number])[1];
    shown.style.aspectRatio = layerElement("image").style.aspectRatio;
  }
  const isError = chosen.map((layer) => layer.startsWith("error"));
  const isDepth = chosen.map((layer) => layer.startsWith("aligned") || layer === "target");
  for (const bar of findAll("[data-bar]")) {
    const wanted = bar.dataset.bar === "error" ? isError : isDepth.map((is) => is && bar.dataset.bar === String(viewer.picture));
    bar.hidden = !wanted.includes(true);
  }
}

/** Colours from white to red by |prediction - truth| / truth, as ABGR; grey where there is no truth. */
function errorColors(prediction, truth) {
  return Uint32Array.from(prediction, (value, cell) => {
    if (!truth[cell] || !value) return 0xff707070;
    const paleness = 1 - Math.min(Math.abs(value - truth[cell]) / truth[cell] / page.error_limit, 1);
    const [red, other] = [Math.round(170 + 85 * Math.sqrt(paleness)), Math.round(15 + 240 * paleness)];
    return ((255 << 24) | (other << 16) | (other << 8) | red) >>> 0;
  });
}

async function showClouds() {
  const cloud = page.clouds[viewer.picture];
  const model = find("#cloud-model").value;
  const truth = decodeGrid(cloud, "target");
  const prediction = decodeGrid(cloud, model);
  const colors = await gridColors(cloud, layerElement("image").src);
  if (cloud !== page.clouds[viewer.picture] || model !== find("#cloud-model").value) return; // chosen anew meanwhile
  const predictionColors = find("#cloud-colors").value === "error" ? errorColors(prediction, truth) : colors;
  clouds.views = [
    { canvas: find("#cloud-target"), points: backProject(cloud, truth, colors) },
    { canvas: find("#cloud-prediction"), points: backProject(cloud, prediction, predictionColors) },
  ];
  find("#cloud-name").textContent = model;
  find("#cloud-camera").textContent = cloud.assumed
    ? `The camera of this image is not known: drawn with an assumed field of view of ${page.assumed_field_of_view}° across.`
    : "Drawn with the intrinsics of the data set.";
  drawClouds();
}

function choosePicture(number) {
  viewer.picture = number;
  for (const button of findAll(".strip button")) button.setAttribute("aria-pressed", Number(button.dataset.picture) === number);
  showSlider();
  showClouds();
}

if (viewer.slider) {
  for (const id of ["#left", "#right"]) {
    find(id).append(...layers.map(([layer, name]) => new Option(name, layer)));
    find(id).addEventListener("input", showSlider);
  }
  find("#left").value = "aligned/0";
  find("#right").value = page.models.length > 1 ? "aligned/1" : "target";
  const range = find("input", viewer.slider);
  const place = () => viewer.slider.style.setProperty("--at", `${range.value / 10}%`);
  range.addEventListener("input", place);
  place();
  for (const button of findAll(".strip button")) {
    find(".thumb", button).append(Object.assign(new Image(), { src: find(`#image-${button.dataset.picture}`).src, alt: "" }));
  }
  for (const button of findAll("[data-picture]")) {
    button.addEventListener("click", () => {
      choosePicture(Number(button.dataset.picture));
      if (button.matches(".show")) find("#closer").scrollIntoView();
    });
  }
  for (const id of ["#cloud-model", "#cloud-colors"]) find(id).addEventListener("input", showClouds);
  find("#cloud-reset").addEventListener("click", resetClouds);
  for (const canvas of findAll("canvas")) listen(canvas);
  new ResizeObserver(drawClouds).observe(find(".clouds"));
  choosePicture(0);
}
