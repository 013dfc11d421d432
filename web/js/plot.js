// A drawing over steps in the page, with the numbers under the pointer or at the step that the arrow keys have reached.
import { drawn, element } from "./dom.js";
import { count, value } from "./words.js";

export const MARGIN = { left: 34, right: 8, top: 6, bottom: 15 };

/** Subclasses give `draw`, which sets `x` and the `places` that can be pointed at; `at` is the chosen one. */
export class Plot {
  constructor(said) {
    this.legend = element("div", { className: "lw-legend" });
    this.svg = drawn("svg", { role: "img" });
    this.place = element("div", { className: "lw-plot", tabIndex: 0, "aria-label": `${said}; arrow keys move along the curve` }, this.svg);
    this.root = element("div", { className: "lw-chart" }, this.legend, this.place);
    this.place.addEventListener("pointermove", (event) => this.point(event));
    this.place.addEventListener("pointerleave", () => this.choose(undefined));
    this.place.addEventListener("blur", () => this.choose(undefined));
    this.place.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.place);
  }

  point(event) {
    const box = this.place.getBoundingClientRect();
    if (!this.x || !box.width) return;
    // The node may be shown larger or smaller than it is.
    const place = ((event.clientX - box.left) / box.width) * this.place.clientWidth;
    this.choose(nearest(this.places, this.x.back(place)));
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.places?.length) return;
    event.preventDefault();
    event.stopPropagation();
    const here = this.at === undefined ? this.places.length - (by > 0 ? 0 : 1) : this.places.indexOf(this.at) + by;
    this.choose(this.places[Math.max(0, Math.min(here, this.places.length - 1))]);
  }

  choose(at) {
    if (at === this.at) return;
    this.at = at;
    this.draw();
  }
}

/** A straight map from one range to another, with the way back. */
export function scale([low, high], [start, end]) {
  const wide = high - low || 1;
  const map = (number) => start + ((number - low) / wide) * (end - start);
  map.back = (place) => low + ((place - start) / (end - start)) * wide;
  map.domain = [low, high];
  return map;
}

/** Two to four round numbers within a range. */
export function ticks([low, high]) {
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const width = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / width);
  const last = Math.floor(high / width);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, number) => (first + number) * width);
}

export function stepTicks(most, width) {
  const wanted = Math.max(1, Math.floor(width / 90));
  const power = 10 ** Math.floor(Math.log10(most / wanted || 1));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= most / wanted) || 1;
  const each = Math.max(1, size);
  return Array.from({ length: Math.floor(most / each) + 1 }, (_, number) => number * each);
}

export function gridLine(level, y, width, text = value(level)) {
  return [
    drawn("line", { class: "lw-grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
    drawn("text", { class: "lw-tick", x: MARGIN.left - 5, y: y + 3, "text-anchor": "end" }, text),
  ];
}

export function stepLabel(at, x, width, height) {
  const anchor = x < MARGIN.left + 20 ? "start" : x > width - 25 ? "end" : "middle";
  return drawn("text", { class: "lw-tick", x, y: height - 3, "text-anchor": anchor }, count(at));
}

export function path(className, points, x, y) {
  const places = points.map(([at, level]) => `${x(at).toFixed(1)},${Math.max(0, y(level)).toFixed(1)}`);
  return drawn("path", { class: className, d: places.length ? `M${places.join("L")}` : "" });
}

/** The last point at or before a step. */
export function near(points, at) {
  return points.findLast(([step]) => step <= at) ?? points[0];
}

function nearest(numbers, wanted) {
  return numbers.reduce((best, number) => (Math.abs(number - wanted) < Math.abs(best - wanted) ? number : best), numbers[0]);
}
