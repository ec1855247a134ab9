// What every page has: the choice between light and dark.
"use strict";

const button = document.getElementById("theme");
const root = document.documentElement;
const dark = () =>
  root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => {
  button.textContent = dark() ? "Light" : "Dark";
};
if (button) {
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    // In a cookie, so that the server writes it into the next page and nothing flashes.
    document.cookie = `theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
    label();
  });
}
