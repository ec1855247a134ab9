// One key a verdict. The next item comes when the server has the last one on its disk; until then nothing moves, and a
// server that does not answer is asked again with the same request, which it counts once.
"use strict";

const screen = document.getElementById("screen");
const status = document.getElementById("status");
const KEYS = { y: "yes", n: "no", u: "unsure" };
const FIELDS = { l: "label", o: "note" };
let busy = false;

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

function say(text, trouble = false) {
  status.textContent = text;
  status.classList.toggle("trouble", trouble);
}

// The answer of the server, however long it takes to come back; throws what the server refuses.
async function send(path, fields) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 5000)) {
    try {
      const answer = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(fields),
      });
      const result = await answer.json();
      if (answer.ok) return result;
      if (answer.status !== 429) throw new Refused(result);
      say(result.error, true);
    } catch (error) {
      if (error instanceof Refused) throw error;
      say("Not saved yet: the server does not answer. Trying again; keep this page open.", true);
    }
    await wait(pause);
  }
}

class Refused extends Error {
  constructor(result) {
    super([result.error, result.fix].filter(Boolean).join(" "));
  }
}

async function act(path, fields) {
  const form = document.getElementById("answer");
  if (busy || !form) return;
  busy = true;
  form.setAttribute("aria-busy", "true");
  try {
    const result = await send(path, fields);
    // Escaped by the server's templates.
    screen.innerHTML = result.html;
    scrollTo(0, 0);
    document.getElementById("item-h")?.focus({ preventScroll: true });
    say(result.said);
  } catch (error) {
    form.removeAttribute("aria-busy");
    say(error.message[0].toUpperCase() + error.message.slice(1), true);
  } finally {
    busy = false;
  }
}

const judge = (verdict) => {
  const form = document.getElementById("answer");
  if (form?.elements.item) act("/api/review/verdict", { ...Object.fromEntries(new FormData(form)), verdict });
};
const undo = () => act("/api/review/undo", {});

document.addEventListener("submit", (event) => {
  if (event.target.id !== "answer") return;
  event.preventDefault();
  const button = event.submitter;
  if (button?.classList.contains("undo")) undo();
  else if (button?.value) judge(button.value);
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, textarea, select");
  if (typing && (event.key === "Escape" || event.key === "Enter") && !event.isComposing) {
    event.preventDefault(); // Enter in a text field is no verdict: it goes back to the keys
    document.getElementById("item-h")?.focus();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  const form = document.getElementById("answer");
  if (KEYS[key]) judge(KEYS[key]);
  else if (key === "z" || event.key === "Backspace") undo();
  else if (FIELDS[key] && form?.elements[FIELDS[key]]) form.elements[FIELDS[key]].focus();
  else return;
  event.preventDefault();
});

addEventListener("beforeunload", (event) => {
  if (busy) event.preventDefault();
});
