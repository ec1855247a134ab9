// A feature's page: keys, and reading the text with both models.
"use strict";

const keys = { j: "to-next", k: "to-previous", u: "to-list", s: "to-play", l: "to-label" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.target.closest("input, select, textarea")) return;
  const target = document.getElementById(keys[event.key]);
  if (target?.matches("input")) {
    event.preventDefault();
    target.select();
  } else target?.click();
});

const panel = document.getElementById("reading");
if (panel) {
  const button = document.getElementById("read-both");
  const state = document.getElementById("read-state");
  const say = (job) => {
    if (job.state === "running") {
      const part = job.total ? ` ${Math.floor((100 * job.done) / job.total)} %` : "";
      state.textContent = `${job.what}${part}`;
    } else if (job.state === "failed") {
      state.textContent = [job.error, job.fix].filter(Boolean).join(" ");
    }
  };
  const follow = async () => {
    for (;;) {
      const answer = await fetch("/api/both-models").catch(() => null);
      if (!answer?.ok) {
        state.textContent = "The server does not answer. Is it still running?";
        break;
      }
      const job = await answer.json();
      say(job);
      if (job.state === "done") return location.reload();
      if (job.state !== "running") break;
      await new Promise((later) => setTimeout(later, 700));
    }
    button.disabled = false;
  };
  button.hidden = false;
  button.addEventListener("click", async () => {
    button.disabled = true;
    const answer = await fetch("/api/both-models", { method: "POST" });
    if (answer.ok || answer.status === 409) return follow();
    say({ state: "failed", ...(await answer.json()) });
    button.disabled = false;
  });
  if (panel.dataset.state === "running" || panel.dataset.state === "failed") follow();
}
