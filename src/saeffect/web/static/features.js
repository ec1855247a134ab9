// The list follows each keystroke and filter; addresses can be shared, and all works without this script too.
"use strict";

const form = document.getElementById("ask");
const box = document.getElementById("q");
const results = document.getElementById("results");
const summary = document.getElementById("said");
const trouble = document.getElementById("trouble");
let running = null;

const formParams = () => {
  const params = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    if (value.trim() && !(name === "by" && value === "writes")) params.set(name, value);
  }
  return params;
};

const address = (params) => "/features" + (params.size ? `?${params}` : "");

function show(html) {
  results.innerHTML = html; // the server's own page, with every string escaped there
  const list = results.querySelector(".list");
  summary.textContent = list.dataset.total;
  const counts = JSON.parse(list.dataset.counts);
  for (const [name, valueCounts] of Object.entries(counts)) {
    const select = form.elements[name];
    if (select instanceof HTMLSelectElement) fill(select, valueCounts);
  }
}

function fill(select, counts) {
  const selected = select.value;
  const number = new Intl.NumberFormat("en-US");
  const options = Object.entries(counts).map(([value, n]) => new Option(`${value} (${number.format(n)})`, value));
  if (selected && !(selected in counts)) options.push(new Option(`${selected} (0)`, selected));
  select.replaceChildren(new Option(select.dataset.none, ""), ...options);
  select.value = selected;
}

async function load(params, { push = false } = {}) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  try {
    const answer = await fetch(`/api/features/rows?${params}`, { signal });
    if (!answer.ok) {
      const problem = await answer.json();
      throw new Error([problem.error, problem.fix].filter(Boolean).join(" "));
    }
    const html = await answer.text();
    if (signal.aborted) return;
    show(html);
    trouble.hidden = true;
    history[push ? "pushState" : "replaceState"](null, "", address(params));
  } catch (error) {
    if (error.name === "AbortError") return;
    trouble.textContent = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
    trouble.hidden = false;
  }
}

function fillForm(params) {
  for (const field of form.elements) {
    if (field.name) field.value = params.get(field.name) ?? (field.name === "by" ? "writes" : "");
  }
}

for (const button of document.querySelectorAll(".without-script")) button.hidden = true;
form.addEventListener("input", (event) => {
  if (event.target === box || event.target.type === "number") load(formParams());
});
form.addEventListener("change", (event) => {
  if (event.target !== box) load(formParams(), { push: true });
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  load(formParams(), { push: true });
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-load]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  const params = new URL(link.href).searchParams;
  fillForm(params);
  const again = link.rel || link.closest("th") ? link.getAttribute("rel") : null;
  load(params, { push: true }).then(() => {
    if (again) results.scrollIntoView({ block: "start" });
  });
});
addEventListener("popstate", () => {
  const params = new URLSearchParams(location.search);
  fillForm(params);
  load(params);
});

const links = () => [...results.querySelectorAll("a.open")];
function move(step) {
  const all = links();
  const next = all[Math.min(all.length - 1, Math.max(0, all.indexOf(document.activeElement) + step))];
  next?.focus();
  next?.closest("tr").scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing) {
    if (event.target === box && event.key === "ArrowDown") {
      event.preventDefault();
      links()[0]?.focus();
    } else if (event.key === "Escape") typing.blur();
    return;
  }
  const actions = {
    "/": () => box.select(),
    f: () => {
      const filters = document.getElementById("filters");
      filters.open = !filters.open;
      filters.querySelector(filters.open ? "select" : "summary").focus();
    },
    j: () => move(1),
    k: () => move(-1),
    n: () => results.querySelector("a[rel=next]")?.click(),
    p: () => results.querySelector("a[rel=prev]")?.click(),
  };
  const action = actions[event.key] ?? (links().includes(document.activeElement)
    ? { ArrowDown: actions.j, ArrowUp: actions.k }[event.key] : undefined);
  if (action) {
    event.preventDefault();
    action();
  }
});
