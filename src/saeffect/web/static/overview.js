// Follows a run: the progress of its stage, and the page anew when a stage has finished.
"use strict";

const RUNNING = 1500;
const RESTING = 10000;
const PENDING = 400;

const liveSection = () => document.getElementById("live");

const openDetails = () => [...liveSection().querySelectorAll("details")].map((details) => details.open);

async function renew() {
  const answer = await fetch("/", { headers: { Accept: "text/html" } });
  const next = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
  if (!next) return location.reload();
  const opened = openDetails();
  liveSection().replaceWith(next);
  const panels = [...next.querySelectorAll("details")];
  if (panels.length === opened.length) panels.forEach((details, i) => (details.open = opened[i]));
}

function show(state) {
  const bar = document.getElementById("share");
  if (bar && state.share === null) bar.removeAttribute("value");
  else if (bar) bar.value = state.share;
  const doing = document.getElementById("doing");
  if (doing) doing.textContent = state.doing;
}

let timer = 0;

async function follow() {
  clearTimeout(timer);
  let wait = RESTING;
  try {
    if (!document.hidden) {
      const answer = await fetch("/api/progress");
      if (answer.ok) {
        const state = await answer.json();
        if (state.outline === liveSection().dataset.outline) show(state);
        else await renew();
        wait = !state.ready ? PENDING : state.condition === "running" ? RUNNING : RESTING;
      }
    }
  } catch {
    wait = RESTING; // the server is gone, or not back yet
  }
  clearTimeout(timer);
  timer = setTimeout(follow, wait);
}

timer = setTimeout(follow, liveSection().dataset.ready === "no" ? PENDING : RUNNING);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) follow();
});
