// The distributions of a weight on either side, drawn over one range.

import { html, quantity, svg } from "./text.js";

const WIDTH = 288;
const HEIGHT = 56;

/** A picture of both: the first graph's as filled bars, the second's as an outline, so that colour is not needed.
    `legend` is said of a weight that has only bars. */
export function histogramPicture([low, high, a, b], legend) {
  const most = Math.max(...a, ...(b ?? []), 1);
  const step = WIDTH / a.length;
  const height = (count) => (count ? Math.max(1, (count / most) * (HEIGHT - 4)) : 0);
  const bars = a.map((count, bin) => svg("rect", { class: "bar", x: bin * step + 0.5, width: step - 1,
    y: HEIGHT - height(count), height: height(count) }));
  const picture = svg("svg", { class: "histogram", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" },
    svg("title", {}, spoken(low, high, a, b)), bars);
  if (b) {
    const points = b.map((count, bin) => `H${bin * step} V${HEIGHT - height(count)} H${(bin + 1) * step}`).join(" ");
    picture.append(svg("path", { class: "outline", d: `M0 ${HEIGHT} ${points} V${HEIGHT}` }));
  }
  const ends = html("div", "ends", html("span", "", number(low)),
    html("span", "", b ? "filled: A, line: B" : legend), html("span", "", number(high)));
  return html("figure", "", picture, ends);
}

function number(value) {
  return Number(value.toPrecision(3)).toString();
}

function spoken(low, high, a, b) {
  const total = (counts) => quantity(counts.reduce((sum, count) => sum + count, 0));
  return `${total(a)} numbers${b ? ` and ${total(b)}` : ""} from ${number(low)} to ${number(high)}`;
}
