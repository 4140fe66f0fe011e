"use strict";
const form = document.getElementById("search");
const count = new Intl.NumberFormat("en");
let page = 0, classes = [], latest = 0;

function element(name, text, style) {
  const created = document.createElement(name);
  created.textContent = text;
  if (style) created.className = style;
  return created;
}

function card(row) {
  const figure = document.createElement("figure"), image = document.createElement("img");
  image.loading = "lazy";
  image.alt = `image of row ${row.row}`;
  image.src = `/image/${row.row}`;
  image.addEventListener("error", () => image.replaceWith(element("p", "The image cannot be shown.", "short")));
  const caption = document.createElement("figcaption");
  if (!row.valid) caption.append(element("p", [row.reason, row.detail].filter(Boolean).join(": "), "reason"));
  caption.append(element("p", row.caption || "No caption.", row.caption ? "" : "reason"));
  if (row.short_caption && row.short_caption !== row.caption) caption.append(element("p", row.short_caption, "short"));
  const figures = [`row ${row.row}`, `shard ${row.shard}`, row.id, `${row.words} words`];
  if (row.width) figures.push(`${row.width} × ${row.height} px`);
  if (row.label >= 0) figures.push(classes[row.label] || `class ${row.label}`);
  caption.append(element("p", figures.join(" · "), "figures"));
  figure.append(image, caption);
  return figure;
}

async function ask(path) {
  const response = await fetch(path), answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function show() {
  const query = new URLSearchParams(new FormData(form)), number = ++latest, found = document.getElementById("found");
  query.set("page", page);
  try {
    const answer = await ask(`/captions?${query}`);
    if (number !== latest) return;
    const pages = Math.max(1, Math.ceil(answer.count / answer.page_size));
    found.textContent = `${count.format(answer.count)} captions found.`;
    document.getElementById("rows").replaceChildren(...answer.rows.map(card));
    document.getElementById("page").textContent = `page ${count.format(page + 1)} of ${count.format(pages)}`;
    document.getElementById("previous").disabled = page === 0;
    document.getElementById("next").disabled = page + 1 >= pages;
  } catch (error) {
    found.textContent = error.message;
  }
}

function turn(step) { page += step; show().then(() => window.scrollTo(0, 0)); }

async function begin() {
  const about = await ask("/summary");
  classes = about.class_names;
  document.getElementById("summary").textContent =
    `${count.format(about.rows)} rows, ${count.format(about.valid)} valid, ${count.format(about.empty)} without a caption` +
    ` (${count.format(about.empty_and_valid)} of them valid).`;
  for (const [reason, number] of about.reasons)
    form.elements.reason.append(new Option(`${reason} (${count.format(number)})`, reason));
  for (const label of about.labels) form.elements.label.append(new Option(classes[label] || `class ${label}`, label));
  if (!about.alike) form.querySelector("option[value=alike]").disabled = true;
  for (const name of about.figures) for (const [end, word] of [["min", "at least"], ["max", "at most"]]) {
    const label = element("label", `${name}, ${word}`), input = document.createElement("input");
    input.name = `${name}_${end}`;
    input.inputMode = "decimal";
    input.size = 8;
    label.append(input);
    document.getElementById("limits").append(label);
  }
  await show();
}

form.addEventListener("submit", (event) => { event.preventDefault(); page = 0; show(); });
form.addEventListener("change", () => { page = 0; show(); });
document.getElementById("previous").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
begin();
