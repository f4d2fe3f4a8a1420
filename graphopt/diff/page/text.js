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

/** The element of the page with this id. */
export function part(id) {
  return document.getElementById(id);
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

const ruler = document.createElement("canvas").getContext("2d");

/** How wide a text is in a font, in pixels. */
export function textWidth(text, font) {
  ruler.font = `${font} system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

/** As much of a text as fits into `room` pixels: its end is cut off, or its beginning where the end says more. */
export function fitted(text, room, font, keepEnd = false) {
  const shown = printable(text);
  if (textWidth(shown, font) <= room) return shown;
  let [fits, most] = [0, shown.length];
  const cut = (length) => (keepEnd ? `…${shown.slice(shown.length - length)}` : `${shown.slice(0, length)}…`);
  while (most - fits > 1) {
    const middle = (fits + most) >> 1;
    if (textWidth(cut(middle), font) <= room) fits = middle;
    else most = middle;
  }
  return cut(fits);
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
