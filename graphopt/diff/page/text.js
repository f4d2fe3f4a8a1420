// Everything that a model says gets onto the page here: as text, and never as markup.

const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]/gu;

/** The text on one line, with every character that hides, or that a terminal acts on, written as its number. */
export function printable(text) {
  return String(text).replace(HIDDEN, (character) => {
    const code = character.codePointAt(0);
    const [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
    return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
  });
}

/** An element of HTML with a class and children; strings among them become text. */
export function html(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  append(made, children);
  return made;
}

/** An element of SVG with attributes and children. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  append(made, children);
  return made;
}

function append(parent, children) {
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === "") continue;
    parent.append(child instanceof Node ? child : printable(child));
  }
}

/** The end of a text is cut off, or its beginning where the end says more. */
export function shortened(text, most, keepEnd = false) {
  const shown = printable(text);
  if (shown.length <= most) return shown;
  return keepEnd ? `…${shown.slice(1 - most)}` : `${shown.slice(0, most - 1)}…`;
}

/** 1834000000 as 1.83 G; an expression in free sizes as it stands. */
export function quantity(size) {
  if (size === null || size === undefined) return "none";
  if (typeof size !== "number") return printable(size);
  for (const [unit, factor] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= factor) return `${Number((size / factor).toPrecision(3))} ${unit}`;
  }
  return String(size);
}

/** "1 node", "2 nodes". */
export function counted(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}
