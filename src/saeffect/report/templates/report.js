// Adds searching, filtering and sorting to the list of features. The page is complete without it.
"use strict";
(() => {
  const tools = document.getElementById("tools");
  const lists = [...document.querySelectorAll("[data-list]")];
  if (tools && lists.length) {
    const [find, arm, sort, state] = ["find", "arm", "sort", "state"].map((id) => document.getElementById(id));
    const shownCount = document.getElementById("shown-count");
    const cards = lists.map((list) => [...list.querySelectorAll(".feature")]);
    const total = cards.reduce((sum, some) => sum + some.length, 0);

    const key = (card, name) => (card.dataset[name] ? Number(card.dataset[name]) : -Infinity);
    const order = () => {
      lists.forEach((list, i) => {
        const holder = list.querySelector(".cards");
        const sorted = cards[i]
          .map((card, place) => ({ card, place, value: key(card, sort.value) }))
          .sort((a, b) => (b.value === a.value ? a.place - b.place : b.value - a.value));
        holder.append(...sorted.map((entry) => entry.card));
      });
    };
    const filter = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      lists.forEach((list, i) => {
        const armHidden = arm.value && arm.value !== list.dataset.list;
        let inList = 0;
        for (const card of cards[i]) {
          const hit = words.every((word) => card.dataset.find.includes(word));
          card.hidden = !hit || Boolean(state.value && card.dataset.state !== state.value);
          if (!card.hidden) inList += 1;
        }
        list.hidden = armHidden;
        if (!armHidden) shown += inList;
      });
      shownCount.textContent = `${shown} of ${total} listed features`;
    };
    tools.addEventListener("submit", (event) => event.preventDefault());
    find.addEventListener("input", filter);
    arm.addEventListener("change", filter);
    state.addEventListener("change", filter);
    sort.addEventListener("change", order);
    tools.hidden = false;
    filter();
  }

  // Paper has no way to open what is folded.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details[data-print]:not([open])")];
    for (const details of opened) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
