// A comparison made ready to be drawn: rows (a node of either graph or a matched pair), edges and groups of rows.

import { KINDS } from "./marks.js";

/** A comparison of the data, with everything looked up that later steps need. */
export function readComparison(data, number) {
  const found = data.comparisons[number];
  const sides = { a: data.graphs[found.a], b: data.graphs[found.b] };
  const rows = found.rows.map(([a, b], place) => ({
    id: `r${place}`, place, a, b, kinds: new Set(), entries: [], changes: [], partner: null, error: null, group: null,
    nodeA: a === null ? null : sides.a.nodes[a], nodeB: b === null ? null : sides.b.nodes[b],
  }));
  const rowOf = {
    a: new Map(rows.filter((row) => row.a !== null).map((row) => [row.a, row])),
    b: new Map(rows.filter((row) => row.b !== null).map((row) => [row.b, row])),
  };
  const comparison = { ...found, sides, rows, rowOf, edges: edgesOf(sides, rowOf), groups: groupsOf(found, rows) };
  comparison.tensorOf = {
    a: new Map(found.tensors.map((tensor) => [tensor.a, tensor])),
    b: new Map(found.tensors.map((tensor) => [tensor.b, tensor])),
  };
  markRows(comparison);
  return comparison;
}

function groupsOf(found, rows) {
  const groups = found.groups.map((group, place) => ({ ...group, id: `g${place}`, place, groups: [], rows: [] }));
  for (const group of groups) {
    group.outer = group.parent === null ? null : groups[group.parent];
    group.outer?.groups.push(group);
    for (let row = group.first; row <= group.last; row++) rows[row].group = group;
  }
  for (const row of rows) row.group?.rows.push(row);
  return groups;
}

function edgesOf(sides, rowOf) {
  const edges = new Map();
  for (const side of ["a", "b"]) {
    for (const [index, target] of rowOf[side]) {
      for (const [, operand] of sides[side].nodes[index].operands ?? []) {
        const source = rowOf[side].get(operand);
        if (source === undefined) continue;
        const key = `${source.place}-${target.place}`;
        if (!edges.has(key)) edges.set(key, { source, target, a: false, b: false });
        edges.get(key)[side] = true;
      }
    }
  }
  return [...edges.values()];
}

function markRows(comparison) {
  const { rows, rowOf, entries, changes, links, numbers } = comparison;
  for (const entry of entries) {
    for (const place of entry.rows) {
      const row = rows[place];
      row.kinds.add(entry.kind);
      row.entries.push(entry);
      if (entry.kind === "rewritten" && !(row.nodeA && row.nodeB)) row.kinds.add(row.nodeA ? "removed" : "inserted");
    }
  }
  for (const [a, b, list] of changes) {
    for (const row of new Set([rowOf.a.get(a), rowOf.b.get(b)])) if (row) row.changes = list;
  }
  for (const [a, b] of links) {
    const [first, second] = [rowOf.a.get(a), rowOf.b.get(b)];
    [first.partner, second.partner] = [second, first];
  }
  for (const [a, error, within] of numbers?.errors ?? []) {
    const row = rowOf.a.get(a);
    if (row) row.error = { text: error, within, first: numbers.first === a };
  }
}

/** The kinds of differences of some rows, in the order in which kinds are always listed. */
export function kindsOf(rows) {
  const found = new Set();
  for (const row of rows) for (const kind of row.kinds) found.add(kind);
  return KINDS.filter((kind) => found.has(kind));
}

/** All rows of a group, those of groups in it included. */
export function rowsIn(comparison, group) {
  return comparison.rows.slice(group.first, group.last + 1);
}

/** What a row is called, on the side that has it. */
export function nameOf(row) {
  const { nodeA, nodeB } = row;
  if (!nodeA || !nodeB || nodeA.name === nodeB.name) return (nodeA ?? nodeB).name;
  return `${nodeA.name} = ${nodeB.name}`;
}
