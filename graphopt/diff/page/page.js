// What is chosen, what is folded and which step is shown, and how one changes the other.

import { Camera } from "./camera.js";
import { nameOf, readComparison } from "./comparison.js";
import { showDetails } from "./details.js";
import { Drawing } from "./drawing.js";
import { openAtFirst, reveal, standIn, visible } from "./folding.js";
import { layOut } from "./layout.js";
import { markLine, showDifferences, showFound } from "./list.js";
import { search } from "./search.js";
import { counted, part, printable } from "./text.js";

/** The page that shows `data`. */
export class Page {
  constructor(data) {
    this.data = data;
    this.canvas = part("canvas");
    this.camera = new Camera(this.canvas, () => this.redraw());
    this.drawing = new Drawing(this.canvas, this.camera);
    this.asked = 0;
    this.comparisons = new Map();
  }

  /** Show a step: the comparison before and after a pass, or the only one. */
  async showStep(number) {
    this.step = number;
    part("step").value = String(number);
    const step = this.data.steps[number];
    if (!this.comparisons.has(step.comparison)) {
      this.comparisons.set(step.comparison, readComparison(this.data, step.comparison));
    }
    this.comparison = this.comparisons.get(step.comparison);
    this.open = openAtFirst(this.comparison);
    this.entry = -1;
    const [a, b] = part("names").children;
    a.textContent = `A  ${printable(this.comparison.sides.a.source)}`;
    b.textContent = `B  ${printable(this.comparison.sides.b.source)}`;
    this.choose(null);
    part("search").value = "";
    this.showList();
    await this.arrange();
    this.fit();
  }

  fit() {
    if (this.graph?.nodes.length) this.camera.fit(this.layout, this.placeOf(this.graph.nodes[0]));
  }

  /** Lay out what is seen now; `anchor`, a row or group, stays where it is on the screen. */
  async arrange(anchor = null) {
    const turn = ++this.asked;
    const before = anchor && this.placeOf(anchor);
    const graph = visible(this.comparison, this.open);
    const slow = setTimeout(() => this.say(`laying out ${counted(graph.nodes.length, "node")} …`), 150);
    let layout = null;
    try {
      layout = await layOut(graph);
    } catch (error) {
      this.say(`the layout failed: ${error.message ?? error}`);
      throw error;
    } finally {
      clearTimeout(slow);
    }
    if (turn !== this.asked) return;
    this.layout = layout;
    this.graph = graph;
    const after = anchor && this.placeOf(anchor);
    if (before && after) {
      this.camera.x += (before.x + before.width / 2 - after.x - after.width / 2) * this.camera.scale;
      this.camera.y += (before.y - after.y) * this.camera.scale;
    }
    this.markFound();
    this.drawing.show(this.comparison, graph, layout);
    this.say(this.comparison.summary);
    document.documentElement.dataset.drawn = String(turn);
  }

  /** The rectangle of a row or group, or of what stands for it. */
  placeOf(thing) {
    if (!this.layout) return null;
    const own = this.layout.places.get(thing.id);
    return own ?? this.layout.places.get((thing.rows ? thing : standIn(thing, this.open)).id);
  }

  thing(id) {
    if (!id) return null;
    const place = Number(id.slice(1));
    return id[0] === "r" ? this.comparison.rows[place] : this.comparison.groups[place];
  }

  choose(thing) {
    this.chosen = thing;
    this.drawing.chosen = thing?.id ?? null;
    this.drawing.paint();
    this.redraw();
    showDetails(part("details"), this.comparison, thing, (row) => this.goTo(row));
    if (thing) part("spoken").textContent = printable(thing.rows ? `module ${thing.label}` : this.spoken(thing));
  }

  spoken(row) {
    const node = row.nodeB ?? row.nodeA;
    return `${nameOf(row)}, ${node.operator ?? node.kind}, ${[...row.kinds].join(", ") || "unchanged"}`;
  }

  /** Choose a row or group and bring it into view, unfolding what is around it. */
  async goTo(thing, always = false) {
    const seen = this.open.size;
    reveal(thing, this.open);
    if (this.open.size !== seen) await this.arrange();
    this.choose(thing);
    const place = this.placeOf(thing);
    if (place) this.camera.show(place, always);
  }

  async toggle(thing) {
    const group = thing?.rows ? thing : thing?.group;
    if (!group) return;
    if (this.open.has(group)) this.open.delete(group);
    else this.open.add(group);
    this.choose(group);
    await this.arrange(group);
    const place = this.placeOf(group);
    if (place) this.camera.show(place);
  }

  async setAll(open) {
    this.open = new Set(open ? this.comparison.groups : []);
    await this.arrange();
    const place = this.chosen && this.placeOf(this.chosen);
    if (place) this.camera.show(place, true);
    else this.fit();
  }

  /** Go to the next or previous difference, round and round. */
  async difference(by) {
    const { entries, rows } = this.comparison;
    if (!entries.length) return this.say("there is no difference");
    this.entry = this.entry < 0 && by < 0 ? entries.length - 1 : (this.entry + by + entries.length) % entries.length;
    if (part("search").value) {
      part("search").value = "";
      this.showList();
    }
    markLine(part("list"), "entry", this.entry);
    const [first] = entries[this.entry].rows;
    if (first !== undefined) await this.goTo(rows[first]);
    return this.say(`difference ${this.entry + 1} of ${entries.length}: ${entries[this.entry].title}`);
  }

  showList() {
    const list = part("list");
    const text = part("search").value;
    this.found = search(this.comparison, text);
    this.markFound();
    this.drawing.paint();
    this.match = -1;
    if (text.trim()) {
      showFound(list, text, this.found, (row, number) => this.showMatch(number));
      return;
    }
    showDifferences(list, this.comparison, this.data.steps[this.step], ([row], number) => {
      if (number !== undefined) this.entry = number;
      markLine(list, "entry", number);
      if (row) this.goTo(this.comparison.rows[row.place]);
    });
  }

  /** Mark what was found, or the closed module that it lies in. */
  markFound() {
    this.drawing.found = new Set(this.found.map((row) => standIn(row, this.open).id));
  }

  async showMatch(number) {
    if (!this.found.length) return;
    this.match = (number + this.found.length) % this.found.length;
    markLine(part("list"), "found", this.match);
    this.say(`${this.match + 1} of ${this.found.length}`);
    await this.goTo(this.found[this.match]);
  }

  /** From the chosen node to a neighbour: along an edge, or to the nearest on its left or right. */
  neighbour(direction) {
    if (!this.graph?.nodes.length) return;
    const own = this.chosen && this.placeOf(this.chosen);
    if (!own) {
      this.goTo(this.graph.nodes[0]);
      return;
    }
    const id = this.chosen.id;
    const { edges, nodes } = this.graph;
    let near = [];
    if (direction === "up") near = edges.filter((edge) => edge.target.id === id).map((edge) => edge.source);
    else if (direction === "down") near = edges.filter((edge) => edge.source.id === id).map((edge) => edge.target);
    else {
      const side = direction === "left" ? -1 : 1;
      near = nodes.filter((node) => (this.placeOf(node).x - own.x) * side > 1);
    }
    const aside = direction === "left" || direction === "right" ? 4 : 1;
    const far = (place) => Math.hypot(place.x - own.x, (place.y - own.y) * aside);
    const [nearest] = near.sort((x, y) => far(this.placeOf(x)) - far(this.placeOf(y)));
    if (nearest) this.goTo(nearest);
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.drawing.refresh();
    });
  }

  say(text) {
    part("status").textContent = printable(text);
  }
}
