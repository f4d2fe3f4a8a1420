// What keys do, and the page of help that says so.

import { KINDS, markPicture, meaning } from "./marks.js";
import { html } from "./text.js";

/** Each action: its keys, what it does, and a name. */
export const KEYS = [
  [["/"], "search; Enter goes on to the next, Shift Enter back, Escape ends it", "search"],
  [["n"], "next difference", "next"],
  [["p"], "previous difference", "previous"],
  [["ArrowUp"], "what the chosen node reads", "up"],
  [["ArrowDown"], "what reads it", "down"],
  [["ArrowLeft"], "the node to the left", "left"],
  [["ArrowRight"], "the node to the right", "right"],
  [["Enter", " "], "fold or unfold the chosen module, or fold the one around the chosen node", "toggle"],
  [["f"], "fold all modules", "fold"],
  [["u"], "unfold all modules", "unfold"],
  [["+", "="], "larger", "larger"],
  [["-"], "smaller", "smaller"],
  [["0"], "fit to the width, from the top", "fit"],
  [["PageUp"], "a page up", "pageUp"],
  [["PageDown"], "a page down", "pageDown"],
  [["["], "the pass before", "stepBack"],
  [["]"], "the pass after", "stepOn"],
  [["t"], "light, dark, or as the system says", "theme"],
  [["?"], "this list", "help"],
  [["Escape"], "choose nothing, close this list", "leave"],
];

const SHOWN = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", " ": "Space" };

/** Call the action of every key that is pressed outside of a field. */
export function listen(actions) {
  const actionOf = new Map(KEYS.flatMap(([keys, , action]) => keys.map((key) => [key, action])));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, dialog")) return;
    const presses = event.key === "Enter" || event.key === " ";
    if (presses && event.target.closest?.("button, summary")) return;
    const action = actionOf.get(event.key);
    if (!action) return;
    event.preventDefault();
    actions[action]();
  });
}

/** Fill the dialog with the keys and the signs. */
export function fillHelp(dialog) {
  const keys = KEYS.map(([names, text]) => html("tr", "",
    html("th", "", names.map((name) => html("kbd", "", SHOWN[name] ?? name))), html("td", "", text)));
  const signs = KINDS.map((kind) => html("tr", "", html("th", "", markPicture(kind)),
    html("td", "", `${kind}: ${meaning(kind)}`)));
  signs.push(html("tr", "", html("th", "", html("span", "derived-sign")),
    html("td", "", "dashed: follows from a difference elsewhere")));
  const close = html("button", "", "Close");
  close.onclick = () => dialog.close();
  dialog.replaceChildren(
    html("section", "", html("h2", "", "Keys"), html("table", "", keys)),
    html("section", "", html("h2", "", "Signs"), html("table", "", signs), html("h2", "", "Mouse"),
      html("p", "", "Drag or scroll to move, Ctrl and scroll to zoom, double click to fold and unfold."), close),
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
