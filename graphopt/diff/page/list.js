// The list at the left: differences by module, or what was searched for; for a pass, its edits and misses.

import { nameOf } from "./comparison.js";
import { markPicture } from "./marks.js";
import { counted, html } from "./text.js";

const MOST = 400;

/** Show all differences of a comparison, and the journal of the pass. */
export function showDifferences(panel, comparison, step, choose) {
  const modules = new Map();
  comparison.entries.forEach((entry, number) => {
    const module = entry.path.split(".")[0];
    if (!modules.has(module)) modules.set(module, []);
    modules.get(module).push([entry, number]);
  });
  const parts = [html("h2", "", counted(comparison.entries.length, "difference"))];
  let left = MOST;
  for (const [module, entries] of modules) {
    parts.push(html("h3", "", module || "(top)"));
    const shown = entries.slice(0, left);
    left -= shown.length;
    parts.push(...shown.map(([entry, number]) => difference(entry, number, choose)));
    const more = entries.length - shown.length;
    if (more) parts.push(html("p", "quiet", `${more} more; use n and p`));
  }
  panel.replaceChildren(...parts, ...journal(comparison, step, choose));
}

function difference(entry, number, choose) {
  const button = html("button", "entry", markPicture(entry.kind),
    html("span", "", html("span", "kind", entry.kind), ` ${entry.title}`,
      entry.path ? html("span", "quiet", ` ${entry.path}`) : null,
      entry.passes.length ? html("span", "quiet", ` by ${entry.passes.join(", ")}`) : null));
  button.dataset.entry = number;
  button.onclick = () => choose(entry.rows.map((place) => ({ place })), number);
  return button;
}

function journal(comparison, { edits, misses }, choose) {
  const parts = [];
  const rowNamed = new Map();
  for (const row of comparison.rows) {
    for (const node of [row.nodeB, row.nodeA]) if (node) rowNamed.set(node.name, row);
  }
  const lines = (title, rows, text) => {
    if (!rows.length) return;
    const shown = rows.slice(0, MOST).map((one) => {
      const row = rowNamed.get(one.node);
      const button = html("button", "entry", html("span", "", ...text(one)));
      button.disabled = !row;
      button.onclick = () => choose([row]);
      return button;
    });
    if (rows.length > MOST) shown.push(html("p", "quiet", `${rows.length - MOST} more`));
    parts.push(html("details", "journal", html("summary", "", title), ...shown));
    parts.at(-1).open = !comparison.entries.length || rows.length < 20;
  };
  lines(`The pass made ${counted(edits.length, "edit")}`, edits, (edit) => [
    html("span", "kind", edit.kind), ` ${edit.node}`, html("span", "quiet", ` ${edit.why}`),
    html("code", "", edit.after ? `${edit.before} → ${edit.after}` : edit.before)]);
  lines(`It left ${counted(misses.length, "node")} alone`, misses, (miss) => [
    html("span", "kind", miss.node), html("span", "quiet", ` ${miss.reason}`)]);
  return parts;
}

/** Show what was found by a search. */
export function showFound(panel, text, rows, choose) {
  const items = rows.slice(0, MOST).map((row, number) => {
    const node = row.nodeB ?? row.nodeA;
    const button = html("button", "entry", html("span", "", html("span", "kind", node.operator ?? node.kind ?? ""),
      ` ${nameOf(row)}`, node.path ? html("span", "quiet", ` ${node.path}`) : null));
    button.dataset.found = number;
    button.onclick = () => choose(row, number);
    return button;
  });
  const more = rows.length > MOST ? [html("p", "quiet", `${rows.length - MOST} more`)] : [];
  panel.replaceChildren(html("h2", "", `${counted(rows.length, "node")} with “${text}”`), ...items, ...more);
}

/** Mark the line that is current. */
export function markLine(panel, name, number) {
  for (const line of panel.querySelectorAll("button.entry")) {
    const current = line.dataset[name] === String(number);
    line.classList.toggle("current", current);
    if (current) line.scrollIntoView({ block: "nearest" });
  }
}
