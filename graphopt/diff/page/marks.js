// How the kinds of differences are told apart: by a shape, by a letter in it, and by colour.

import { svg } from "./text.js";

const MARKS = {
  rewritten: { letter: "R", shape: "M-8 0 L-4 -8 L4 -8 L8 0 L4 8 L-4 8 Z" },
  removed: { letter: "−", shape: "M-7 -7 H7 V7 H-7 Z" },
  inserted: { letter: "+", shape: "M-8 0 A8 8 0 1 1 8 0 A8 8 0 1 1 -8 0 Z" },
  changed: { letter: "~", shape: "M0 -9 L9 0 L0 9 L-9 0 Z" },
  moved: { letter: "M", shape: "M-8 -7 H3 L9 0 L3 7 H-8 Z" },
  pruned: { letter: "P", shape: "M-8 -7 H8 L5 8 H-5 Z" },
  widened: { letter: "W", shape: "M-5 -8 H5 L8 7 H-8 Z" },
  permuted: { letter: "X", shape: "M-8 -7 L0 -4 L8 -7 V7 L0 4 L-8 7 Z" },
};

export const KINDS = Object.keys(MARKS);

const MEANINGS = {
  rewritten: "a region became another",
  removed: "only in the first graph",
  inserted: "only in the second graph",
  changed: "matched, with something in it changed",
  moved: "the same node stands elsewhere",
  pruned: "channels are gone",
  widened: "channels are new",
  permuted: "the same positions in another order",
};

/** What a kind of difference means, in a few words. */
export function meaning(kind) {
  return MEANINGS[kind];
}

/** The sign of a kind, centred on a point. */
export function mark(kind, x, y) {
  const { letter, shape } = MARKS[kind];
  const made = svg("g", { class: `mark ${kind}`, transform: `translate(${x} ${y})` });
  made.append(svg("path", { d: shape }), svg("text", { y: 4 }, letter));
  return made;
}

/** The same as a picture of its own, to stand in a line of text. */
export function markPicture(kind) {
  return svg("svg", { class: "mark-picture", viewBox: "-10 -10 20 20", width: 18, height: 18, "aria-hidden": "true" },
    mark(kind, 0, 0));
}
