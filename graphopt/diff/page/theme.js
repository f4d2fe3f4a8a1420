// Light or dark: as the system says, until the reader says otherwise.

const KEY = "graphopt-theme";
const NAMES = { auto: "◐", light: "☀", dark: "☾" };

/** Wire the switch; returns a function that turns it by one. */
export function themeSwitch(button) {
  const set = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = NAMES[name];
    button.setAttribute("aria-label", `Theme: ${name}`);
    remember(name);
  };
  const turn = () => {
    const names = Object.keys(NAMES);
    const now = document.documentElement.dataset.theme ?? "auto";
    set(names[(names.indexOf(now) + 1) % names.length]);
  };
  button.onclick = turn;
  set(remembered());
  return turn;
}

function remembered() {
  try {
    const name = localStorage.getItem(KEY);
    return name in NAMES ? name : "auto";
  } catch {
    return "auto"; // a page that is a file may have no storage
  }
}

function remember(name) {
  try {
    localStorage.setItem(KEY, name);
  } catch {
    // nothing to do: it is asked again next time
  }
}
