"use strict";
const source = document.getElementById("figures").textContent;

// Colours stand in the figures as names of CSS variables, so both themes draw the same figures.
function figuresInTheme() {
  const style = getComputedStyle(document.documentElement);
  return JSON.parse(source, (key, value) =>
    typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim() || value : value);
}

const clickable = new Set();  // figures whose clicks are already listened to

function draw() {
  for (const [id, figure] of Object.entries(figuresInTheme())) {
    const place = document.getElementById(id);
    if (!place || !figure) continue;
    const narrow = place.clientWidth < 560;
    if (narrow) figure.layout.annotations = [];  // the legend names the symbols
    if (narrow) figure.layout.font.size = 11;
    if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;  // leave the finger to scrolling
    Plotly.react(place, figure.data, figure.layout, {responsive: true, displayModeBar: false});
    if (clickable.has(id)) continue;
    clickable.add(id);
    place.on("plotly_click", event => {
      const trial = event.points.map(point => point.customdata).find(number => number !== undefined);
      if (trial !== undefined) choose(trial);
    });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let pending;
addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(draw, 150); });

// Sort by what a cell stands for, not by its text; cells without a value go last both ways.
function sortBy(heading) {
  const column = heading.cellIndex, numeric = heading.classList.contains("number");
  const down = heading.getAttribute("aria-sort") === "ascending";
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].map(row => [row.cells[column].dataset.value, row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numeric ? a - b : a.localeCompare(b, undefined, {numeric: true});
    return down ? -order : order;
  });
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}

for (const heading of document.querySelectorAll(".trials th")) {
  heading.querySelector("button").addEventListener("click", () => sortBy(heading));
}

// Filters: rows of a class, and rows that contain every word.
const which = document.getElementById("which"), text = document.getElementById("text");
const rows = [...document.querySelectorAll(".trials tbody tr")];

function filter() {
  const asked = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const words = row.textContent.toLowerCase();
    row.hidden = Boolean(which.value && !row.classList.contains(which.value)) || !asked.every(word => words.includes(word));
    shown += !row.hidden;
  }
  document.getElementById("shown").value = `${shown} of ${rows.length}`;
}

which.addEventListener("change", filter);
text.addEventListener("input", filter);
filter();  // a browser may have kept what was typed before

// One trial in a dialog; its place among the rows as they are sorted and filtered says which is next.
const dialog = document.querySelector("dialog"), detail = document.getElementById("detail");
let chosen;

function choose(trial) {
  const template = document.getElementById(`trial-${trial}`);
  if (!template) return;
  chosen = Number(trial);
  detail.replaceChildren(template.content.cloneNode(true));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  history.replaceState(null, "", `#trial-${trial}`);
}

function step(by) {
  const order = [...document.querySelectorAll(".trials tbody tr:not([hidden])")].map(row => Number(row.dataset.trial));
  const next = order[order.indexOf(chosen) + by];
  if (next !== undefined) choose(next);
}

document.querySelector(".trials tbody").addEventListener("click", event => {
  const row = event.target.closest("tr");
  if (row && !getSelection().toString()) choose(row.dataset.trial);
});
document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
if (location.hash.startsWith("#trial-")) choose(location.hash.slice(7));

// While a search is watched: a new page when trials have ended, but not under the hands of who has opened a trial.
if ("live" in document.body.dataset) {
  const sign = document.getElementById("live");
  let version;
  const follow = async () => {
    try {
      const now = await (await fetch("/version")).json();
      if (version !== undefined && now !== version && !dialog.open && !document.hidden && !text.value) location.reload();
      version ??= now;
    } catch {
      sign.textContent = "○ the search has ended or was stopped; what it leaves is in report.html";
      sign.className = "over";
    }
  };
  follow();
  setInterval(follow, 5000);
}
