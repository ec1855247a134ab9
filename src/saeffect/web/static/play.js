// The playground: choose features, ask both models, and show their tokens as they come.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("ask");
const STEPS = 5;
// One queue for each tab, so that several tabs get their turns.
const client = Array.from(crypto.getRandomValues(new Uint8Array(9)), (x) => x.toString(16).padStart(2, "0")).join("");

/** What acts on a page instead of being seen is shown by its number, as the server does. */
const printable = (text) =>
  text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}]/gu, (c) =>
    c === "\n" || c === "\t" ? c : `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`,
  );

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const content = await answer.json();
  if (!answer.ok) throw new Error([content.error, content.fix].filter(Boolean).join(" "));
  return content;
}

const say = (text) => {
  $("status").textContent = text;
};

if (form) begin();

function begin() {
  let running = null; // {abort, job, query}
  let last = null; // job of the result that is shown
  let scale = [];
  let texts = new Map(); // by side: one record a text

  // ---- the request --------------------------------------------------------------------------------------------
  const chosenFeatures = () => Array.from($("chosen").children, (item) => Number(item.dataset.feature));

  function formValues() {
    const data = new FormData(form);
    const number = (name) => Number(data.get(name));
    return {
      prompt: data.get("prompt"),
      chat: data.get("chat") === "1",
      arm: chosenFeatures().length ? data.get("arm") : "",
      features: chosenFeatures(),
      operator: data.get("operator"),
      dose: number("dose"),
      positions: data.get("positions"),
      placebo: chosenFeatures().length ? data.get("placebo") : "",
      temperature: number("temperature"),
      top_p: number("top_p"),
      frequency_penalty: number("frequency_penalty"),
      max_new_tokens: number("max_new_tokens"),
      seed: number("seed"),
      ends: data.get("ends") === "1",
    };
  }

  function featureItem(feature) {
    const arm = $("arm").value;
    const words = feature.label || feature.tokens.map((token) => token.trim()).join(", ");
    return make(
      "li",
      { "data-feature": feature.feature },
      make("a", { href: `/features/${encodeURIComponent(arm)}/${feature.feature}` }, String(feature.feature)),
      " ",
      make("span", {}, printable(words)),
      make("button", { type: "button", class: "quiet", "aria-label": `Remove feature ${feature.feature}` }, "×"),
    );
  }

  function changed() {
    const features = chosenFeatures();
    $("export").hidden = !features.length;
    for (const link of $("export").querySelectorAll("a")) {
      const query = new URLSearchParams({ format: link.dataset.format, arm: $("arm").value });
      features.forEach((feature) => query.append("feature", feature));
      if (link.dataset.dose === "1" && $("operator").value === "add" && Number($("dose").value)) {
        query.set("dose", $("dose").value);
      }
      link.href = `/api/export?${query}`;
    }
    for (const link of $("export-domain").querySelectorAll("a")) {
      link.href = `/api/export?${new URLSearchParams({ format: link.dataset.format, group: "domain", arm: $("arm").value })}`;
    }
    const operator = $("operator").value;
    $("dose-field").hidden = operator === "ablate";
    $("dose-unit").textContent = $("dose-unit").dataset[operator] ?? "";
    const [low, high, step] = operator === "clamp" ? [0, 10, 0.25] : [-2, 2, 0.05];
    Object.assign($("dose-slide"), { min: low, max: high, step });
    $("dose-slide").value = $("dose").value;
  }

  $("chosen").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    button.closest("li").remove();
    changed();
    $("find").focus();
  });
  $("arm").addEventListener("change", () => {
    // Numbers mean other features in another SAE.
    $("chosen").replaceChildren();
    changed();
  });
  $("operator").addEventListener("change", () => {
    $("dose").value = { add: 0.4, clamp: 5, ablate: 1 }[$("operator").value];
    changed();
  });
  $("dose").addEventListener("input", changed);
  $("dose-slide").addEventListener("input", () => {
    $("dose").value = $("dose-slide").value;
    changed();
  });
  $("reseed").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
  });

  // ---- choosing features -----------------------------------------------------------------------------------------
  const find = $("find");
  const list = $("found");
  let options = [];
  let active = -1;
  let latestSearch = 0;

  function close() {
    list.hidden = true;
    find.setAttribute("aria-expanded", "false");
    find.removeAttribute("aria-activedescendant");
    active = -1;
  }

  function mark(index) {
    active = index;
    Array.from(list.children).forEach((item, i) => item.setAttribute("aria-selected", String(i === active)));
    if (active >= 0) {
      find.setAttribute("aria-activedescendant", `found-${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    }
  }

  async function searchFeatures() {
    const search = ++latestSearch;
    const query = new URLSearchParams({ arm: $("arm").value, q: find.value });
    let matches = [];
    try {
      const answer = await fetch(`/api/play/features?${query}`);
      if (answer.ok) matches = await answer.json();
    } catch {
      return;
    }
    if (search !== latestSearch) return; // superseded by a later key press
    const selected = new Set(chosenFeatures());
    options = matches.filter((option) => !selected.has(option.feature));
    list.replaceChildren(
      ...options.map((option, i) =>
        make(
          "li",
          { role: "option", id: `found-${i}`, "aria-selected": "false" },
          make("b", {}, String(option.feature)),
          make("span", {}, printable(option.label || option.tokens.map((token) => token.trim()).join(", "))),
        ),
      ),
    );
    if (!options.length) list.append(make("li", { class: "none", role: "option", "aria-disabled": "true" }, "No feature fits."));
    list.hidden = false;
    find.setAttribute("aria-expanded", "true");
    active = -1;
  }

  function addFeature(index) {
    if (!options[index]) return;
    if (chosenFeatures().length >= Number(form.dataset.most)) {
      say(`At most ${form.dataset.most} features at once.`);
      return;
    }
    $("chosen").append(featureItem(options[index]));
    find.value = "";
    close();
    changed();
  }

  find.addEventListener("input", searchFeatures);
  find.addEventListener("focus", searchFeatures);
  find.addEventListener("blur", () => setTimeout(close, 150));
  list.addEventListener("pointerdown", (event) => {
    const item = event.target.closest("li");
    if (!item) return;
    event.preventDefault();
    addFeature(Array.from(list.children).indexOf(item));
  });
  find.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) searchFeatures();
      else if (options.length) mark((active + (event.key === "ArrowDown" ? 1 : -1) + options.length) % options.length);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (!list.hidden) addFeature(Math.max(active, 0));
    } else if (event.key === "Escape") close();
  });

  // ---- the events -------------------------------------------------------------------------------------------------
  function tint(span, acts) {
    const share = Math.max(0, ...acts.map((value, i) => value / (scale[i] || 1)));
    if (share <= 0 || span.className) return;
    span.className = `a${Math.min(STEPS, 1 + Math.floor(share * STEPS))}`;
    const features = running ? running.features : [];
    span.title = acts
      .map((value, i) => (value > 0 ? `${features[i]}: ${value.toPrecision(3)}` : ""))
      .filter(Boolean)
      .join(", ");
  }

  function start(event) {
    scale = event.scale;
    texts = new Map();
    $("empty").hidden = true;
    $("answer-bar").hidden = false;
    $("answers").replaceChildren(
      ...event.sides.map((side) => {
        const rows = side.rows.map((row) => {
          const text = make("p", { class: "text writing" });
          return { text, spans: [], told: 0, box: make("div", { class: `answer c-${row.condition}` }, make("h3", {}, row.label), text) };
        });
        const prompt = make("p");
        const title = make("h2", {}, side.name, make("small", {}, printable(side.model)));
        texts.set(side.name, { rows, prompt });
        return make(
          "section",
          { class: `side arm-${side.role}`, "aria-label": side.name },
          title,
          ...side.notes.map((note) => make("p", { class: "notes" }, printable(`No placebo: ${note}.`))),
          make("details", {}, make("summary", {}, "The prompt as it is read"), prompt),
          ...rows.map((row) => row.box),
        );
      }),
    );
  }

  function tokens(event) {
    const side = texts.get(event.side);
    side.rows.forEach((row, i) => {
      const acts = event.acts[i];
      if (acts && row.spans[row.told]) tint(row.spans[row.told++], acts);
      const piece = event.pieces[i];
      if (piece === null) {
        row.text.classList.remove("writing");
        if (event.rest[i]) row.spans.at(-1).textContent += printable(event.rest[i]);
      } else {
        // Line feeds before the first word would be a hole in the page.
        row.begun = row.begun || piece.trim() !== "";
        const feed = !row.begun && piece.includes("\n");
        const span = make("span", feed ? { class: "feed" } : {}, printable(feed ? piece.replaceAll("\n", "↵") : piece));
        row.spans.push(span);
        row.text.append(span);
      }
    });
  }

  function prompt(event) {
    const place = texts.get(event.side).prompt;
    for (const [piece, acts] of event.tokens) {
      const span = make("span", {}, printable(piece));
      tint(span, acts);
      place.append(span);
    }
  }

  function receive(event) {
    if (event.type === "job") running.job = event.job;
    else if (event.type === "queued") say(`Waiting: ${event.ahead} before you.`);
    else if (event.type === "working") say(`${event.what[0].toUpperCase()}${event.what.slice(1)} …`);
    else if (event.type === "start") {
      start(event);
      say("Writing …");
      // On a narrow screen the answers stand below the settings.
      if ($("answer-bar").getBoundingClientRect().top > innerHeight - 80) $("answer-bar").scrollIntoView();
    } else if (event.type === "tokens") {
      if (running.first === undefined) running.first = (performance.now() - running.began) / 1000;
      tokens(event);
    } else if (event.type === "prompt") prompt(event);
    else if (event.type === "done") {
      last = running.job;
      $("keep").disabled = false;
      say(`Done in ${event.seconds.toFixed(1)} s, first token after ${running.first.toFixed(1)} s.`);
    } else if (event.type === "stopped") say("Stopped.");
    else if (event.type === "error") {
      say([event.what, event.fix].filter(Boolean).join(" "));
      state();
    }
    if (event.type === "job") history.replaceState(null, "", `/play?${event.query}`);
  }

  async function run() {
    if (running) return;
    const ask = formValues();
    running = { abort: new AbortController(), began: performance.now(), features: ask.features };
    last = null;
    $("keep").disabled = true;
    $("run").disabled = true;
    $("stop").hidden = false;
    say("Asking …");
    try {
      const answer = await fetch("/api/play/run", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...ask, client }),
        signal: running.abort.signal,
      });
      if (!answer.ok) {
        const content = await answer.json();
        throw new Error([content.error, content.fix].filter(Boolean).join(" "));
      }
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let partial = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (partial + value).split("\n");
        partial = lines.pop();
        lines.filter(Boolean).forEach((line) => receive(JSON.parse(line)));
      }
    } catch (error) {
      say(error.name === "AbortError" ? "Stopped." : error.message);
    } finally {
      running = null;
      $("run").disabled = false;
      $("stop").hidden = true;
      document.querySelectorAll(".text.writing").forEach((text) => text.classList.remove("writing"));
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("stop").addEventListener("click", () => {
    if (!running) return;
    if (running.job) post("/api/play/stop", { job: running.job }).catch(() => running && running.abort.abort());
    else running.abort.abort();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && list.hidden) $("stop").click();
  });

  // ---- placebo, keeping, sharing ---------------------------------------------------------------------------------
  $("placebo").addEventListener("click", () => {
    if (!chosenFeatures().length) {
      say("Choose a feature first: a placebo is a push of its size.");
      return;
    }
    const values = ["matched", "random"];
    const now = form.elements.placebo.value;
    form.elements.placebo.value = values[(values.indexOf(now) + 1) % values.length];
    run();
  });
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      say("The link is copied: it asks for the same, and gives the same texts.");
    } catch {
      say(`The link is in the address bar.`);
    }
  });
  $("keep").addEventListener("click", async () => {
    try {
      const saved = await post("/api/play/keep", { job: last });
      $("keep").disabled = true;
      if (!$("kept-list").querySelector(`[data-id="${saved.id}"]`)) $("kept-list").prepend(keptItem(saved));
      $("kept").hidden = false;
      say("Kept.");
    } catch (error) {
      say(error.message);
    }
  });

  function keptItem(result) {
    return make(
      "li",
      { "data-id": result.id },
      make("label", { class: "check" }, make("input", { type: "checkbox", name: "id", value: result.id }), make("span", { class: "sr" }, "Choose ")),
      make("a", { href: result.url }, printable(result.title)),
      make("button", { type: "button", class: "quiet", "aria-label": `Delete: ${result.title}` }, "×"),
    );
  }

  $("kept-list").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const item = button.closest("li");
    try {
      await post("/api/play/forget", { id: item.dataset.id });
      item.remove();
      $("kept").hidden = !$("kept-list").children.length;
    } catch (error) {
      say(error.message);
    }
  });
  $("compare").addEventListener("submit", (event) => {
    if (new FormData($("compare")).getAll("id").length) return;
    event.preventDefault();
    say("Choose the results to compare.");
  });

  // ---- state of the models --------------------------------------------------------------------------------------
  async function state() {
    let engine;
    try {
      engine = await (await fetch("/api/play/state")).json();
    } catch {
      return;
    }
    const failed = engine.state === "failed";
    $("model-trouble").hidden = !failed;
    if (failed) {
      $("model-what").textContent = printable([engine.what, engine.at].filter(Boolean).join(" — "));
      $("model-fix").textContent = printable(engine.fix);
    }
    if (!running) {
      if (engine.state === "loading" || engine.state === "cold") say("Loading the models …");
      else if (engine.state === "ready" && /^(Loading|$)/.test($("status").textContent)) say("Ready.");
    }
    if (engine.state === "loading" || engine.state === "cold") setTimeout(state, 700);
  }
  $("retry").addEventListener("click", async () => {
    $("model-trouble").hidden = true;
    await post("/api/play/warm", {}).catch(() => null);
    state();
  });

  changed();
  state();
  if (form.dataset.asked === "1") run();
}
