"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const modelNumbers = page.models.map((_, number) => number);

/** Marks the heading that a table is sorted by; gives its direction: the other one when it was chosen before. */
function turn(button, first) {
  const heading = button.closest("th");
  const other = { ascending: "descending", descending: "ascending" };
  const direction = other[heading.getAttribute("aria-sort")] ?? first;
  for (const one of findAll("th[aria-sort]", heading.closest("thead"))) one.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", direction);
  return direction;
}

/** Order of two values, numbers before texts' alphabet; what is no number comes last in both directions. */
function compare(a, b, direction) {
  const missing = (value) => value === null || Number.isNaN(value);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return direction === "ascending" ? order : -order;
}

// Means: models are sorted within their data set.
for (const button of findAll("#means-table thead button")) {
  button.addEventListener("click", () => {
    const column = button.closest("th").cellIndex;
    const direction = turn(button, button.dataset.first);
    const value = (row) => (column ? Number.parseFloat(row.cells[column].dataset.value) : row.cells[0].dataset.value);
    for (const body of find("#means-table").tBodies) {
      const rows = [...body.rows].slice(1);
      body.append(...rows.sort((a, b) => compare(value(a), value(b), direction)));
    }
  });
}

// Every image: only the rows in view exist, so ten thousand images scroll as ten do.
const images = {
  order: [],
  metric: 0,
  column: "0",
  direction: page.metrics[0].lower ? "descending" : "ascending", // the worst first
  box: find(".rows"),
  body: find("#image-table tbody"),
};

function spread(scores, image) {
  const values = modelNumbers.map((model) => scores[model][image]);
  return values.includes(null) ? null : Math.max(...values) - Math.min(...values);
}

function sortImages() {
  const scores = page.images.scores[images.metric];
  const value = {
    key: (image) => page.images.keys[image],
    spread: (image) => spread(scores, image),
  }[images.column] ?? ((image) => scores[Number(images.column)][image]);
  const dataset = Number(find("#dataset")?.value ?? -1);
  const part = find("#filter").value.trim().toLowerCase();
  const isShown = (image) =>
    (dataset < 0 || page.images.datasets[image] === dataset) && page.images.keys[image].toLowerCase().includes(part);
  images.order = page.images.keys.map((_, image) => image).filter(isShown);
  const values = new Map(images.order.map((image) => [image, value(image)]));
  images.order.sort((a, b) => compare(values.get(a), values.get(b), images.direction));
  find("#image-count").textContent = `${images.order.length.toLocaleString("en")} of ${page.images.keys.length.toLocaleString("en")}`;
  find("#image-table").setAttribute("aria-rowcount", images.order.length + 1);
  images.box.scrollTop = 0;
  showRows();
}

function shortNumber(value) {
  if (value === null) return "–";
  return value.toFixed(Math.abs(value) < 10 ? 4 : Math.abs(value) < 1000 ? 2 : 0);
}

function thumbnail(picture) {
  const box = document.createElement(picture < 0 ? "span" : "a");
  box.className = picture < 0 ? "thumb none" : "thumb";
  if (picture >= 0) {
    box.href = `#picture-${picture}`;
    box.append(Object.assign(new Image(), { src: find(`#image-${picture}`).src, alt: "shown below" }));
  }
  return box;
}

function makeRow(place) {
  const image = images.order[place];
  const scores = page.images.scores[images.metric];
  const row = document.createElement("tr");
  row.setAttribute("aria-rowindex", place + 2);
  const heading = Object.assign(document.createElement("th"), { scope: "row" });
  const [box, text, small] = ["div", "span", "small"].map((name) => document.createElement(name));
  small.textContent = page.images.dataset_names[page.images.datasets[image]];
  text.append(page.images.keys[image], small);
  text.title = page.images.keys[image];
  box.append(thumbnail(page.images.pictures[image]), text);
  heading.append(box);
  row.append(heading);
  const values = modelNumbers.map((model) => scores[model][image]);
  const best = page.metrics[images.metric].lower ? Math.min(...values) : Math.max(...values);
  const isOne = values.length > 1 && values.filter((value) => value === best).length === 1;
  for (const value of values) {
    const cell = row.insertCell();
    cell.textContent = shortNumber(value);
    if (isOne && value === best) cell.className = "best";
  }
  if (values.length > 1) row.insertCell().textContent = shortNumber(spread(scores, image));
  return row;
}

function gap(rows, height) {
  const row = document.createElement("tr");
  row.className = "gap";
  row.setAttribute("aria-hidden", "true");
  row.insertCell().colSpan = 99;
  row.style.height = `${rows * height}px`;
  return row;
}

function showRows() {
  const height = Number.parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
  const first = Math.max(0, Math.floor(images.box.scrollTop / height) - 5);
  const last = Math.min(images.order.length, first + Math.ceil(images.box.clientHeight / height) + 12);
  const rows = Array.from({ length: last - first }, (_, number) => makeRow(first + number));
  images.body.replaceChildren(gap(first, height), ...rows, gap(images.order.length - last, height));
}

images.box.addEventListener("scroll", () => requestAnimationFrame(showRows));
for (const button of findAll("#image-table thead button")) {
  button.addEventListener("click", () => {
    const isLower = page.metrics[images.metric].lower;
    const first = { key: "ascending", spread: "descending" }[button.dataset.column] ?? (isLower ? "descending" : "ascending");
    images.direction = turn(button, first);
    images.column = button.dataset.column;
    sortImages();
  });
}
for (const id of ["#metric", "#dataset", "#filter"]) {
  find(id)?.addEventListener("input", () => {
    images.metric = Number(find("#metric").value);
    sortImages();
  });
}
turn(find('#image-table [data-column="0"]'), images.direction);
sortImages();
