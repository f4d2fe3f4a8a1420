// What is known about the chosen node or group, both sides beside each other.

import { kindsOf, nameOf, rowsIn } from "./comparison.js";
import { histogramPicture } from "./histogram.js";
import { markPicture, meaning } from "./marks.js";
import { counted, html, quantity } from "./text.js";

const COSTS = { nodes: "operators", macs: "MACs", operations: "other operations", weight_bytes: "bytes of weights",
  moved_bytes: "bytes moved", peak_bytes: "peak bytes" };
const SIDES = [["a", "nodeA"], ["b", "nodeB"]];

/** Fill the panel with a row or group, or with the comparison as a whole; `choose` is called with a row to go to. */
export function showDetails(panel, comparison, thing, choose) {
  if (!thing) panel.replaceChildren(...whole(comparison));
  else if (thing.rows) panel.replaceChildren(...ofGroup(comparison, thing));
  else panel.replaceChildren(...ofRow(comparison, thing, choose));
  panel.scrollTop = 0;
}

function whole(comparison) {
  const { sides, cost } = comparison;
  const parts = [html("h2", "", "Both graphs"), html("p", "", comparison.summary)];
  parts.push(table([
    ["", "A", "B"],
    ["takes and gives", sides.a.signature, sides.b.signature],
    ["history", sides.a.history.join(", ") || "none", sides.b.history.join(", ") || "none"],
    ...Object.entries(cost).map(([name, [a, b]]) => [COSTS[name] ?? name, quantity(a), quantity(b)]),
  ]));
  if (comparison.numbers) parts.push(html("p", "", `error of the outputs: ${comparison.numbers.outputs.join(", ")}`));
  parts.push(html("p", "quiet", "Choose a node to see what it is and what changed in it. Press ? for the keys."));
  return parts;
}

function ofGroup(comparison, group) {
  const rows = rowsIn(comparison, group);
  const sides = ["nodeA", "nodeB"].map((name) => rows.map((row) => row[name]).filter(Boolean));
  const sum = (nodes) => quantity(nodes.reduce((sum, { macs }) => sum + (typeof macs === "number" ? macs : 0), 0));
  const parts = [html("h2", "", group.path || group.label)];
  parts.push(table([
    ["", "A", "B"],
    ["operators", ...sides.map((nodes) => nodes.length)],
    ["MACs", ...sides.map(sum)],
  ]));
  for (const kind of kindsOf(rows)) {
    const number = new Set(rows.flatMap((row) => row.entries).filter((entry) => entry.kind === kind)).size;
    const text = `${counted(number, "difference")}: ${meaning(kind)}`;
    if (number) parts.push(html("p", "entry", markPicture(kind), text));
  }
  parts.push(html("p", "quiet", "Enter, or a double click, folds and unfolds it."));
  return parts;
}

function ofRow(comparison, chosen, choose) {
  const row = together(chosen);
  const parts = [html("h2", "", nameOf(row))];
  for (const entry of row.entries) {
    const passes = entry.passes.length ? html("span", "quiet", ` by ${entry.passes.join(", ")}`) : null;
    const channels = `channels ${entry.channels.join(", ")} of ${entry.of}`;
    const rest = entry.channels.length ? html("span", "quiet", ` ${channels}`) : null;
    const text = html("span", "", `${entry.kind}: ${entry.title}`, passes, rest);
    parts.push(html("p", "entry", markPicture(entry.kind), text));
  }
  parts.push(...changesOf(row));
  parts.push(table(facts(row)));
  const attributes = attributeRows(row);
  if (attributes.length) parts.push(html("h3", "", "Arguments"), table([heads(row), ...attributes]));
  parts.push(...neighbours(comparison, row, choose), ...weights(comparison, row));
  return parts;
}

/** A moved node stands in two rows; what is known about it is shown together. */
function together(row) {
  const { partner } = row;
  if (!partner) return row;
  return { ...row, nodeA: row.nodeA ?? partner.nodeA, nodeB: row.nodeB ?? partner.nodeB };
}

function changesOf(row) {
  const parts = [];
  if (row.changes.length) {
    const items = row.changes.map(([, text, derived]) =>
      html("li", derived ? "quiet" : "", text, derived ? " (follows)" : ""));
    parts.push(html("h3", "", "What changed"), html("ul", "", items));
  }
  if (row.error) {
    const first = row.error.first ? "; the numbers part here" : "";
    parts.push(html("p", row.error.within ? "quiet" : "", `error of what it computes: ${row.error.text}${first}`));
  }
  return parts;
}

/** The sides that have a row, each as its name and the field of its node. */
function sidesOf(row) {
  return SIDES.filter(([, field]) => row[field]);
}

function heads(row) {
  const only = row.nodeA && row.nodeB ? "" : "only in ";
  return ["", ...sidesOf(row).map(([side]) => only + side.toUpperCase())];
}

function facts(row) {
  const labels = { name: "name", operator: "operator", path: "module", value: "makes", macs: "MACs", source: "source" };
  const rows = [heads(row)];
  for (const [name, label] of Object.entries(labels)) {
    const values = sidesOf(row).map(([, field]) => row[field][name]);
    if (values.every((value) => value === undefined)) continue;
    const text = (value) => (value === undefined ? "—" : name === "macs" ? quantity(value) : value);
    rows.push([label, ...values.map(text)]);
  }
  return rows;
}

function attributeRows(row) {
  const names = new Set(sidesOf(row).flatMap(([, field]) => Object.keys(row[field].attributes ?? {})));
  return [...names].map((name) => [name, ...sidesOf(row).map(([, field]) => row[field].attributes?.[name] ?? "—")]);
}

function neighbours(comparison, row, choose) {
  const parts = [];
  for (const [side, field] of SIDES) {
    const operands = (row[field]?.operands ?? []).filter(([, index]) => comparison.rowOf[side].has(index));
    if (!operands.length || (side === "b" && row.nodeA && sameOperands(comparison, row))) continue;
    const label = row.nodeA && row.nodeB && sameOperands(comparison, row) ? "Reads" : `Reads in ${side.toUpperCase()}`;
    const items = operands.map(([slot, index]) => {
      const source = comparison.rowOf[side].get(index);
      const button = html("button", "link-button", nameOf(source));
      button.onclick = () => choose(source);
      return html("li", "", `${slot}: `, button);
    });
    parts.push(html("h3", "", label), html("ul", "", items));
  }
  return parts;
}

function sameOperands(comparison, row) {
  const read = (side, field) =>
    (row[field]?.operands ?? []).map(([, index]) => comparison.rowOf[side].get(index)?.place).join();
  return row.nodeA && row.nodeB && read("a", "nodeA") === read("b", "nodeB");
}

function weights(comparison, row) {
  const found = new Map();
  for (const [side, field] of SIDES) {
    for (const [slot, index] of row[field]?.operands ?? []) {
      const node = comparison.sides[side].nodes[index];
      if (node.kind !== "tensor") continue;
      const tensor = comparison.tensorOf[side].get(node.tensor);
      const key = tensor ? `${tensor.a}\n${tensor.b}` : `${side} ${node.tensor}`;
      if (!found.has(key)) found.set(key, { slot, tensor, a: null, b: null });
      found.get(key)[side] = node;
    }
  }
  const parts = [...found.values()].flatMap(weight);
  return parts.length ? [html("h3", "", "Weights"), ...parts] : [];
}

function weight({ slot, tensor, a, b }) {
  const names = [...new Set([a?.tensor, b?.tensor].filter(Boolean))].join(" = ");
  const values = [...new Set([a?.value, b?.value].filter(Boolean))].join(" → ");
  const both = a && b;
  const only = a ? "only in A" : "only in B";
  const parts = [html("h4", "", `${slot}: ${names}`), html("p", "quiet", values)];
  const differs = both && tensor && tensor.relation !== "equal";
  parts.push(html("p", differs ? "differs" : "quiet", both ? tensor?.text ?? "" : only));
  if (tensor?.histogram) parts.push(histogramPicture(tensor.histogram, both ? "the same on both sides" : only));
  return parts;
}

/** A table of a label and one or both sides; what is the same on both is written once. */
function table(rows) {
  const [head, ...body] = rows.map(([label, ...cells], number) => {
    const tag = number ? "td" : "th";
    const same = number && cells.length > 1 && cells[0] === cells[1];
    const made = (same ? cells.slice(0, 1) : cells).map((cell) => html(tag, "", String(cell)));
    if (same) made[0].colSpan = 2;
    return html("tr", number && cells.length > 1 && !same ? "differs" : "", html("th", "", label), made);
  });
  return html("table", "", html("thead", "", head), html("tbody", "", body));
}
