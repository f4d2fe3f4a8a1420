// Which groups are open, and the graph that is seen then: closed groups and the rows that lie in open ones.

import { kindsOf, rowsIn } from "./comparison.js";

const ALL_OPEN = 160;
const AT_FIRST = 110;

/** The groups that are open at first: all of a small graph, otherwise those with differences while there is room. */
export function openAtFirst(comparison) {
  const { groups, rows } = comparison;
  if (rows.length <= ALL_OPEN) return new Set(groups);
  const open = new Set();
  let seen = groups.filter((group) => !group.outer).length + rows.filter((row) => !row.group).length;
  const waiting = groups.filter((group) => !group.outer);
  const differs = new Map(groups.map((group) => [group, kindsOf(rowsIn(comparison, group)).length > 0]));
  const alike = ![...differs.values()].some(Boolean);
  const room = alike ? AT_FIRST / 2 : AT_FIRST;
  while (waiting.length) {
    const group = waiting.shift();
    if (!alike && !differs.get(group)) continue;
    const inside = group.groups.length + group.rows.length;
    if (seen + inside > room) continue;
    seen += inside - 1;
    open.add(group);
    waiting.push(...group.groups);
  }
  return open;
}

/** What stands for a row: the outermost closed group around it, or the row itself. */
export function standIn(row, open) {
  let seen = row;
  for (let group = row.group; group; group = group.outer) if (!open.has(group)) seen = group;
  return seen;
}

/** Open all groups around a row or group. */
export function reveal(thing, open) {
  for (let group = thing.rows ? thing.outer : thing.group; group; group = group.outer) open.add(group);
}

/** The seen nodes, the edges between them (each once, with the sides that have it), and the open groups that show. */
export function visible(comparison, open) {
  const shown = comparison.rows.map((row) => standIn(row, open));
  const edges = new Map();
  for (const edge of comparison.edges) {
    const [source, target] = [shown[edge.source.place], shown[edge.target.place]];
    if (source === target) continue;
    const key = `${source.id}-${target.id}`;
    if (!edges.has(key)) edges.set(key, { id: key, source, target, a: false, b: false });
    const found = edges.get(key);
    found.a ||= edge.a;
    found.b ||= edge.b;
  }
  const nodes = [...new Set(shown)];
  const boxes = new Set();
  for (const node of nodes) {
    for (let group = node.rows ? node.outer : node.group; group; group = group.outer) boxes.add(group);
  }
  return { nodes, edges: [...edges.values()], boxes: [...boxes] };
}
