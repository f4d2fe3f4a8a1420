// Finding nodes by what they are called, by operator, module or weight.

/** The rows that have the text in one of their names, upper and lower case alike. */
export function search(comparison, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  return comparison.rows.filter((row) => words(comparison, row).some((word) => word.toLowerCase().includes(wanted)));
}

function words(comparison, row) {
  const found = [];
  for (const [side, node] of [["a", row.nodeA], ["b", row.nodeB]]) {
    if (!node) continue;
    found.push(node.name, node.operator ?? "", node.path ?? "", node.kind ?? "");
    for (const [, index] of node.operands ?? []) found.push(comparison.sides[side].nodes[index].tensor ?? "");
  }
  return found;
}
