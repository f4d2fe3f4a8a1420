// Layered drawings by ELK, in a worker that is made from a string of this page. Both sides share one layout.

/* global ELK */

export const NODE = { width: 196, height: 42 };

const OPTIONS = {
  "elk.algorithm": "layered",
  "elk.direction": "DOWN",
  "elk.edgeRouting": "ORTHOGONAL",
  "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF",
  "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
  "elk.layered.spacing.nodeNodeBetweenLayers": "26",
  "elk.layered.spacing.edgeNodeBetweenLayers": "13",
  "elk.layered.spacing.edgeEdgeBetweenLayers": "9",
  "elk.spacing.nodeNode": "22",
  "elk.spacing.edgeNode": "14",
  "elk.spacing.edgeEdge": "9",
};
const ROOT = {
  ...OPTIONS,
  "elk.hierarchyHandling": "INCLUDE_CHILDREN",
  "elk.json.shapeCoords": "ROOT",
  "elk.json.edgeCoords": "ROOT",
  "elk.padding": "[top=16,left=16,bottom=16,right=16]",
};
const BOX = { ...OPTIONS, "elk.padding": "[top=34,left=12,bottom=12,right=12]" };

let elk = null;

function worker() {
  const text = JSON.parse(document.getElementById("worker").textContent).worker;
  const made = new Worker(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
  return made;
}

/** Starts the worker, so that it gets ready while the data is being read. */
export function startLayout() {
  elk ??= new ELK({ workerFactory: worker });
}

/** Where the seen nodes, boxes and edges stand: rectangles by id, and points for every edge. */
export async function layOut(graph) {
  startLayout();
  const laid = await elk.layout(toElk(graph));
  const places = new Map();
  collect(laid.children ?? [], places);
  const lines = new Map();
  for (const edge of laid.edges ?? []) {
    lines.set(edge.id, (edge.sections ?? []).map((one) => [one.startPoint, ...(one.bendPoints ?? []), one.endPoint]));
  }
  return { places, lines, width: laid.width, height: laid.height };
}

function toElk({ nodes, edges, boxes }) {
  const made = new Map(boxes.map((group) => [group, { id: group.id, children: [], layoutOptions: BOX }]));
  const root = { id: "root", children: [], layoutOptions: ROOT };
  const home = (group) => (group ? made.get(group) : root).children;
  const things = [...nodes, ...boxes].sort((x, y) => (x.first ?? x.place) - (y.first ?? y.place));
  for (const thing of things) {
    const own = made.get(thing) ?? { id: thing.id, ...NODE };
    home(thing.rows ? thing.outer : thing.group).push(own);
  }
  root.edges = edges.map((edge) => ({ id: edge.id, sources: [edge.source.id], targets: [edge.target.id] }));
  return root;
}

function collect(children, places) {
  for (const { id, x, y, width, height, children: inner } of children) {
    places.set(id, { x, y, width, height });
    if (inner) collect(inner, places);
  }
}
