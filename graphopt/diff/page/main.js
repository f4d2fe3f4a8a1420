// Starts the page and connects it with the mouse, keys, buttons and fields.

import { fillHelp, listen } from "./keys.js";
import { startLayout } from "./layout.js";
import { Page } from "./page.js";
import { counted, html, part, printable } from "./text.js";
import { themeSwitch } from "./theme.js";

startLayout();
const data = JSON.parse(part("data").textContent);

function listenToMouse(page) {
  const { canvas, camera } = page;
  const target = (event) => page.thing(event.target.closest?.("[data-id]")?.dataset.id);
  canvas.addEventListener("click", (event) => {
    if (camera.dragged) return;
    const thing = target(event);
    if (thing?.rows && event.target.matches(".chevron")) page.toggle(thing);
    else page.choose(thing);
  });
  canvas.addEventListener("dblclick", (event) => {
    const thing = target(event);
    if (thing?.rows) page.toggle(thing);
  });
  new ResizeObserver(() => page.redraw()).observe(canvas);
}

function listenToSearch(page) {
  const field = part("search");
  field.addEventListener("input", () => page.showList());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") page.showMatch(page.match + (event.shiftKey ? -1 : 1));
    if (event.key === "Escape") {
      field.value = "";
      page.showList();
      page.canvas.focus();
    }
  });
}

/** What every key and button does. */
function actionsOf(page) {
  const { camera } = page;
  const step = (by) => {
    const number = page.step + by;
    if (number >= 0 && number < data.steps.length) page.showStep(number);
  };
  return {
    search: () => part("search").focus(),
    next: () => page.difference(1),
    previous: () => page.difference(-1),
    up: () => page.neighbour("up"),
    down: () => page.neighbour("down"),
    left: () => page.neighbour("left"),
    right: () => page.neighbour("right"),
    toggle: () => page.toggle(page.chosen),
    fold: () => page.setAll(false),
    unfold: () => page.setAll(true),
    larger: () => camera.zoom(1.25),
    smaller: () => camera.zoom(0.8),
    fit: () => page.fit(),
    pageUp: () => camera.pan(0, camera.size.height * 0.8),
    pageDown: () => camera.pan(0, -camera.size.height * 0.8),
    stepBack: () => step(-1),
    stepOn: () => step(1),
    theme: themeSwitch(part("theme")),
    help: () => part("help").showModal(),
    leave: () => page.choose(null),
  };
}

function showSteps(page) {
  const choice = part("step");
  data.steps.forEach((step, number) => {
    const edits = step.edits.length ? ` (${counted(step.edits.length, "edit")})` : "";
    const option = html("option", "", `${step.title}${edits}`);
    option.value = String(number);
    choice.append(option);
  });
  part("steps").hidden = data.steps.length < 2;
  choice.onchange = () => page.showStep(Number(choice.value));
}

const page = new Page(data);
const actions = actionsOf(page);
part("title").textContent = printable(data.title);
document.title = `graphopt diff: ${printable(data.title)}`;
listenToMouse(page);
listenToSearch(page);
listen(actions);
fillHelp(part("help"));
for (const id of ["previous", "next", "fold", "unfold", "fit"]) part(id).onclick = actions[id];
part("keys").onclick = actions.help;
showSteps(page);
await page.showStep(data.steps.length - 1);
page.canvas.focus();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
