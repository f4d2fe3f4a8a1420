// What part of the drawing is seen: both panels always show the same part, moved and zoomed together.

const LEAST = 0.04;
const MOST = 3;
const READABLE = 0.8;

/** A camera over `element`, which calls `changed` after every move. */
export class Camera {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    Object.assign(this, { x: 0, y: 0, scale: 1 });
    element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    element.addEventListener("pointerdown", (event) => this.press(event));
  }

  /** The width of one panel and its height, in pixels. */
  get size() {
    return { width: this.element.clientWidth / 2, height: this.element.clientHeight };
  }

  wheel(event) {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) {
      const box = this.element.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 300), (event.clientX - box.left) % this.size.width, event.clientY - box.top);
    } else {
      const unit = event.deltaMode === 1 ? 18 : 1;
      this.pan(-event.deltaX * unit, -event.deltaY * unit);
    }
  }

  press(event) {
    if (event.button !== 0) return;
    let last = [event.clientX, event.clientY];
    const start = last;
    const move = (next) => {
      this.pan(next.clientX - last[0], next.clientY - last[1]);
      last = [next.clientX, next.clientY];
      if (Math.hypot(last[0] - start[0], last[1] - start[1]) > 4) this.dragged = true;
    };
    const stop = () => {
      window.removeEventListener("pointermove", move);
      setTimeout(() => (this.dragged = false));
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", stop, { once: true });
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.changed();
  }

  /** Zoom by a factor; the point of the panel stays where it is, the middle of it where none is given. */
  zoom(factor, px = this.size.width / 2, py = this.size.height / 2) {
    const scale = Math.min(MOST, Math.max(LEAST, this.scale * factor));
    this.x = px - ((px - this.x) * scale) / this.scale;
    this.y = py - ((py - this.y) * scale) / this.scale;
    this.scale = scale;
    this.changed();
  }

  /** The top of a drawing, as large as it fits and can be read; `first` is in the middle where not all can be seen. */
  fit(drawing, first) {
    const { width, height } = this.size;
    this.scale = Math.min(1, Math.max(READABLE, (width - 24) / drawing.width));
    const middle = drawing.width * this.scale < width ? drawing.width / 2 : first.x + first.width / 2;
    this.x = width / 2 - middle * this.scale;
    this.y = drawing.height * this.scale < height ? Math.max(12, (height - drawing.height * this.scale) / 4) : 12;
    this.changed();
  }

  /** Bring a rectangle into the middle, unless it can be seen well already. */
  show(place, always = false) {
    if (this.scale < 0.45) this.scale = READABLE;
    const { width, height } = this.size;
    const [x, y] = [this.x + place.x * this.scale, this.y + place.y * this.scale];
    const [w, h] = [place.width * this.scale, Math.min(place.height * this.scale, height / 2)];
    const margin = 30;
    if (always || x < margin || x + w > width - margin) this.x += (width - w) / 2 - x;
    if (always || y < margin || y + h > height - margin) this.y += (height - h) / 2 - y;
    this.changed();
  }

  /** The rectangle of the drawing that is seen, with some of what is around it. */
  window(margin = 0) {
    const { width, height } = this.size;
    const [w, h] = [width / this.scale, height / this.scale];
    const [x, y] = [-this.x / this.scale, -this.y / this.scale];
    return { left: x - w * margin, right: x + w * (1 + margin), top: y - h * margin, bottom: y + h * (1 + margin) };
  }
}
