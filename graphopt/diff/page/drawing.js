// Draws what the camera sees of a layout, in two panels, and the links of what is matched between them.

import { kindsOf, rowsIn } from "./comparison.js";
import { mark } from "./marks.js";
import { counted, fitted, printable, svg, textWidth } from "./text.js";

const FAR = 0.36;
const MARGIN = 0.5;
const SIDES = ["a", "b"];

/** The picture in `canvas`; `show` gives it something new to draw, `refresh` follows the camera. */
export class Drawing {
  constructor(canvas, camera) {
    this.canvas = canvas;
    this.camera = camera;
    this.chosen = null;
    this.found = new Set();
    this.scene = null;
    this.links = svg("g", { class: "links" });
    this.worlds = { a: svg("g"), b: svg("g") };
    this.clips = { a: svg("rect"), b: svg("rect") };
    const arrow = svg("path", { d: "M0 0 L7 3.5 L0 7 Z" });
    const head = svg("marker", { id: "arrow", viewBox: "0 0 7 7", refX: 6.5, refY: 3.5, markerWidth: 7, markerHeight: 7,
      orient: "auto", markerUnits: "userSpaceOnUse" }, arrow);
    const clips = SIDES.map((side) => svg("clipPath", { id: `clip-${side}` }, this.clips[side]));
    const panels = SIDES.map((side) => svg("g", { class: `panel ${side}`, "clip-path": `url(#clip-${side})` },
      this.worlds[side]));
    this.border = svg("line", { class: "border" });
    canvas.append(svg("defs", {}, head, clips), this.links, ...panels, this.border);
    canvas.addEventListener("pointerover", (event) => this.hover(event.target.closest?.("[data-id]")?.dataset.id));
    canvas.addEventListener("pointerleave", () => this.hover(null));
  }

  /** Draw a comparison as it is folded and laid out. */
  show(comparison, graph, layout) {
    this.comparison = comparison;
    this.scene = { graph, layout, items: graph.nodes.map((node) => summarized(comparison, node)) };
    this.scene.boxes = graph.boxes.map((group) => summarized(comparison, group))
      .sort((x, y) => x.thing.place - y.thing.place);
    this.drawn = null;
    this.refresh();
  }

  refresh() {
    const { width, height } = this.camera.size;
    this.place(width, height);
    if (!this.scene) return;
    const seen = this.camera.window();
    const far = this.camera.scale < FAR;
    const d = this.drawn;
    const inside = d && d.left <= seen.left && d.right >= seen.right && d.top <= seen.top && d.bottom >= seen.bottom;
    if (!inside || far !== d.far) {
      this.drawn = { ...this.camera.window(MARGIN), far };
      this.draw();
    }
    this.drawLinks(width);
  }

  place(width, height) {
    const { x, y, scale } = this.camera;
    SIDES.forEach((side, number) => {
      const box = { x: number * width, y: 0, width, height };
      for (const [name, value] of Object.entries(box)) this.clips[side].setAttribute(name, value);
      this.worlds[side].setAttribute("transform", `translate(${x + number * width} ${y}) scale(${scale})`);
    });
    for (const [name, value] of Object.entries({ x1: width, x2: width, y1: 0, y2: height })) {
      this.border.setAttribute(name, value);
    }
  }

  draw() {
    const { graph, layout, items, boxes } = this.scene;
    const near = (place) => place && place.x < this.drawn.right && place.x + place.width > this.drawn.left
      && place.y < this.drawn.bottom && place.y + place.height > this.drawn.top;
    const at = (item) => layout.places.get(item.thing.id);
    this.seen = items.filter((item) => near(at(item)));
    const seenBoxes = boxes.filter((item) => near(at(item)));
    const lines = graph.edges.flatMap((edge) => (layout.lines.get(edge.id) ?? [])
      .filter((points) => near(around(points))).map((points) => ({ edge, path: rounded(points) })));
    for (const side of SIDES) {
      const parts = seenBoxes.filter((item) => item[side]).map((item) => boxShape(item, at(item)));
      parts.push(...lines.filter(({ edge }) => edge[side]).map(({ edge, path }) => edgeShape(edge, path, side)));
      parts.push(...this.seen.filter((item) => item[side])
        .map((item) => nodeShape(item, at(item), side, this.drawn.far)));
      this.worlds[side].replaceChildren(...parts);
    }
    this.paint();
  }

  /** Lines from the matched nodes of the left panel to those of the right one, under everything else. */
  drawLinks(width) {
    const { places } = this.scene.layout;
    const { x, y, scale } = this.camera;
    const standing = new Map(this.scene.items.map((item) => [item.thing.id, item]));
    const shapes = [];
    for (const item of this.seen) {
      if (!item.a) continue;
      const other = item.thing.partner ? standing.get(item.thing.partner.id) : item.b ? item : null;
      if (!other || (item.thing.partner && !item.thing.nodeA)) continue;
      const [from, to] = [places.get(item.thing.id), places.get(other.thing.id)];
      const start = [Math.min(x + (from.x + from.width) * scale, width), y + (from.y + from.height / 2) * scale];
      const end = [Math.max(width + x + to.x * scale, width), y + (to.y + to.height / 2) * scale];
      const kind = item.kinds[0] ?? (item.derived ? "derived" : "same");
      const classes = `link ${kind}${this.isLit(item.thing.id) || this.isLit(other.thing.id) ? " lit" : ""}`;
      const middle = (start[0] + end[0]) / 2;
      shapes.push(svg("path", { class: classes,
        d: `M${start} C${middle} ${start[1]} ${middle} ${end[1]} ${end}` }));
    }
    this.links.replaceChildren(...shapes);
  }

  isLit(id) {
    return id === this.chosen || id === this.hovered;
  }

  hover(id) {
    if (this.hovered === id) return;
    this.hovered = id;
    this.paint();
    if (this.scene) this.drawLinks(this.camera.size.width);
  }

  /** Show what is chosen, hovered over, and found by the search. */
  paint() {
    const partner = (id) => this.scene?.items.find((item) => item.thing.id === id)?.thing.partner?.id;
    const lit = new Set([this.chosen, this.hovered, partner(this.chosen), partner(this.hovered)]);
    for (const shape of this.canvas.querySelectorAll("[data-id]")) {
      shape.classList.toggle("chosen", shape.dataset.id === this.chosen);
      shape.classList.toggle("lit", lit.has(shape.dataset.id));
      shape.classList.toggle("found", this.found.has(shape.dataset.id));
    }
    for (const line of this.canvas.querySelectorAll("[data-ends]")) {
      line.classList.toggle("lit", line.dataset.ends.split(" ").some((id) => this.isLit(id)));
    }
  }
}

/** What a node or group shows: how much of it is on either side, and the kinds of differences in it. */
function summarized(comparison, thing) {
  const rows = thing.rows ? rowsIn(comparison, thing) : [thing];
  const kinds = kindsOf(rows);
  return {
    thing,
    kinds,
    a: rows.filter((row) => row.nodeA).length,
    b: rows.filter((row) => row.nodeB).length,
    derived: !kinds.length && rows.some((row) => row.changes.length),
    parts: rows.some((row) => row.error?.first),
  };
}

function boxShape({ thing, kinds }, { x, y, width, height }) {
  const label = svg("text", { x: x + 26, y: y + 20 }, fitted(thing.label, width - 40, "600 12px", true));
  return svg("g", { class: `box ${kinds[0] ?? ""}`, "data-id": thing.id },
    svg("title", {}, thing.path || thing.label), svg("rect", { x, y, width, height, rx: 8 }),
    svg("path", { class: "chevron", d: `M${x + 10} ${y + 12} h9 l-4.5 7 Z` }), label);
}

function nodeShape(item, place, side, far) {
  const { thing, kinds, derived, parts } = item;
  const { x, y, width, height } = place;
  const group = Boolean(thing.rows);
  const state = kinds[0] ?? (derived ? "derived" : "same");
  const sort = group ? "folded" : (side === "a" ? thing.nodeA : thing.nodeB).kind ?? "";
  const made = svg("g", { class: `node ${state} ${sort}`, "data-id": thing.id });
  if (group) made.append(svg("rect", { class: "behind", x: x + 4, y: y + 4, width, height, rx: 6 }));
  made.append(svg("rect", { x, y, width, height, rx: group ? 6 : 4 }));
  if (far) return made;
  const texts = group ? groupTexts(item, side) : rowTexts(thing, side);
  const indent = group ? 26 : 10;
  if (group) made.append(svg("path", { class: "chevron", d: `M${x + 11} ${y + 9} v9 l7 -4.5 Z` }));
  const room = width - indent - 10 - 20 * kinds.length;
  const first = fitted(texts.first, room, "600 13px", group);
  const head = svg("text", { class: "operator", x: x + indent, y: y + 17 }, first);
  const left = room - textWidth(first, "600 13px") - 6;
  if (texts.second && left > 24) {
    head.append(svg("tspan", { class: "name", dx: 6 }, fitted(texts.second, left, "12px", true)));
  }
  const value = fitted(texts.third, width - indent - (parts ? 30 : 8), "11px");
  made.append(svg("title", {}, texts.title), head, svg("text", { class: "value", x: x + indent, y: y + 33 }, value));
  kinds.forEach((kind, number) => made.append(mark(kind, x + width - 14 - 20 * number, y + 14)));
  if (parts) made.append(svg("text", { class: "parts", x: x + width - 14, y: y + 36, "text-anchor": "end" }, "≠"));
  return made;
}

function rowTexts(row, side) {
  const node = side === "a" ? row.nodeA : row.nodeB;
  const path = node.path ?? "";
  const around = row.group?.path ?? "";
  const inside = around && path.startsWith(`${around}.`) ? path.slice(around.length + 1) : around === path ? "" : path;
  const first = node.operator ?? node.kind ?? "";
  return { first, second: inside || node.name, third: node.value ?? "",
    title: [node.path || node.name, node.value].filter(Boolean).map(printable).join("\n") };
}

function groupTexts({ thing, a, b }, side) {
  const number = side === "a" ? a : b;
  const change = a === b ? "" : side === "a" ? `, then ${b}` : `, was ${a}`;
  return { first: thing.label, second: "", third: counted(number, "operator") + change,
    title: `${printable(thing.path || thing.label)}: double click or press Enter to unfold` };
}

function edgeShape(edge, path, side) {
  const only = edge.a && edge.b ? "" : side === "a" ? " removed" : " inserted";
  return svg("path", { class: `edge${only}`, d: path, "marker-end": "url(#arrow)",
    "data-ends": `${edge.source.id} ${edge.target.id}` });
}

function around(points) {
  const xs = points.map((point) => point.x);
  const ys = points.map((point) => point.y);
  const [x, y] = [Math.min(...xs), Math.min(...ys)];
  return { x, y, width: Math.max(...xs) - x + 1, height: Math.max(...ys) - y + 1 };
}

/** A line through points with its corners rounded. */
function rounded(points, radius = 6) {
  const parts = [`M${points[0].x} ${points[0].y}`];
  for (let i = 1; i < points.length - 1; i++) {
    const [before, corner, after] = [points[i - 1], points[i], points[i + 1]];
    const start = towards(corner, before, radius);
    const end = towards(corner, after, radius);
    parts.push(`L${start.x} ${start.y} Q${corner.x} ${corner.y} ${end.x} ${end.y}`);
  }
  const last = points.at(-1);
  parts.push(`L${last.x} ${last.y}`);
  return parts.join(" ");
}

function towards(from, to, radius) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const share = Math.min(radius, length / 2) / length;
  return { x: from.x + (to.x - from.x) * share, y: from.y + (to.y - from.y) * share };
}
