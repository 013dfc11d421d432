// The loss and the learning rate of a training as a drawing in the page, with the numbers under the pointer.
import { drawn, element } from "./dom.js";
import { count, value } from "./trainer_words.js";

const MARGIN = { left: 34, right: 8, top: 6, bottom: 15 };
const RATE_HEIGHT = 18;

export class Chart {
  constructor() {
    this.legend = element("div", { className: "lw-legend" });
    this.svg = drawn("svg", { role: "img" });
    this.place = element("div", { className: "lw-plot", tabIndex: 0 }, this.svg);
    this.root = element("div", { className: "lw-chart" }, this.legend, this.place);
    this.place.addEventListener("pointermove", (event) => this.point(event));
    this.place.addEventListener("pointerleave", () => this.choose(undefined));
    this.place.addEventListener("blur", () => this.choose(undefined));
    this.place.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.place);
  }

  show(state) {
    this.state = state;
    this.root.hidden = !state.loss.length && !state.validation.length;
    if (!this.root.hidden) this.draw();
  }

  draw() {
    const [width, height] = [this.place.clientWidth, this.place.clientHeight];
    if (!this.state || !width || !height) return;
    const { loss, smoothed, validation, rate, total, step } = this.state;
    const x = scale([0, shownSteps(step, total)], [MARGIN.left, width - MARGIN.right]);
    const bottom = height - MARGIN.bottom - (rate.length ? RATE_HEIGHT : 0);
    const levels = range(loss, smoothed, validation);
    const y = scale(levels, [bottom, MARGIN.top]);
    this.x = x;
    this.places = [...new Set([...validation, ...smoothed].map(([at]) => at))].sort((one, other) => one - other);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(
      ...ticks(levels).flatMap((level) => gridLine(level, y(level), width)),
      ...stepTicks(x.domain[1], width).map((at) => stepLabel(at, x(at), width, height)),
      path("lw-raw", loss, x, y),
      path("lw-smooth", smoothed, x, y),
      path("lw-held", validation, x, y),
      ...validation.map(([at, level]) => drawn("circle", { class: "lw-held-point", cx: x(at), cy: y(level), r: 2.5 })),
      ...this.rateParts(rate, x, height),
      ...this.cursorParts(height, y),
    );
    this.describe();
  }

  rateParts(rate, x, height) {
    if (!rate.length) return [];
    const bottom = height - MARGIN.bottom;
    const most = Math.max(...rate.map(([, level]) => level));
    const y = scale([0, most || 1], [bottom, bottom - RATE_HEIGHT + 5]);
    return [path("lw-rate", rate, x, y)];
  }

  cursorParts(height, y) {
    if (this.at === undefined) return [];
    const place = this.x(this.at);
    const line = { class: "lw-cursor", x1: place, x2: place, y1: MARGIN.top, y2: height - MARGIN.bottom };
    const smooth = near(this.state.smoothed, this.at);
    const dot = smooth ? [drawn("circle", { class: "lw-here", cx: place, cy: y(smooth[1]), r: 3 })] : [];
    return [drawn("line", line), ...dot];
  }

  /** The numbers at the chosen step, else the newest. */
  describe() {
    const { loss, smoothed, validation, rate } = this.state;
    const at = this.at ?? Infinity;
    const levels = [
      ["lw-raw", "loss", near(loss, at)],
      ["lw-smooth", "smoothed", near(smoothed, at)],
      ["lw-held", "held-out", near(validation, at)],
      ["lw-rate", "rate", near(rate, at)],
    ].filter(([, , found]) => found);
    const parts = levels.map(([className, name, [, level]]) =>
      element("span", { className: `lw-key ${className}` }, `${name} `, element("b", {}, value(level))),
    );
    const step = this.at === undefined ? null : element("span", { className: "lw-at" }, `step ${count(this.at)}`);
    this.legend.replaceChildren(...[step, ...parts].filter(Boolean));
    const said = levels.map(([, name, [, level]]) => `${name} ${value(level)}`).join(", ");
    this.svg.setAttribute("aria-label", `Loss by step: ${said}`);
    this.place.setAttribute("aria-label", "Loss by step; arrow keys move along the curve");
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

/** How many steps the axis shows: all, or of a training that has just begun a half, a quarter and so on. */
function shownSteps(step, total) {
  let most = Math.max(total ?? 0, step, 1);
  while (most >= 40 && most / 2 >= step) most /= 2;
  return most;
}

/** A straight map from one range to another, with the way back. */
function scale([low, high], [start, end]) {
  const wide = high - low || 1;
  const map = (number) => start + ((number - low) / wide) * (end - start);
  map.back = (place) => low + ((place - start) / (end - start)) * wide;
  map.domain = [low, high];
  return map;
}

/** What the vertical axis shows: all of the smooth curves, and the raw loss but for its few wildest steps. */
function range(loss, smoothed, validation) {
  const raw = loss.map(([, level]) => level).sort((one, other) => one - other);
  const inner = raw.slice(Math.floor(raw.length * 0.02), Math.ceil(raw.length * 0.98));
  const levels = [...inner, ...smoothed.map(([, level]) => level), ...validation.map(([, level]) => level)];
  const [low, high] = [Math.min(...levels), Math.max(...levels)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low < 0 ? low - room : Math.max(0, low - room), high + room];
}

/** Two to four round numbers within a range. */
function ticks([low, high]) {
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const width = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / width);
  const last = Math.floor(high / width);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, number) => (first + number) * width);
}

function stepTicks(most, width) {
  const wanted = Math.max(1, Math.floor(width / 90));
  const power = 10 ** Math.floor(Math.log10(most / wanted || 1));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= most / wanted) || 1;
  const each = Math.max(1, size);
  return Array.from({ length: Math.floor(most / each) + 1 }, (_, number) => number * each);
}

function gridLine(level, y, width) {
  return [
    drawn("line", { class: "lw-grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
    drawn("text", { class: "lw-tick", x: MARGIN.left - 5, y: y + 3, "text-anchor": "end" }, value(level)),
  ];
}

function stepLabel(at, x, width, height) {
  const anchor = x < MARGIN.left + 20 ? "start" : x > width - 25 ? "end" : "middle";
  return drawn("text", { class: "lw-tick", x, y: height - 3, "text-anchor": anchor }, count(at));
}

function path(className, points, x, y) {
  const places = points.map(([at, level]) => `${x(at).toFixed(1)},${Math.max(0, y(level)).toFixed(1)}`);
  return drawn("path", { class: className, d: places.length ? `M${places.join("L")}` : "" });
}

/** The last point at or before a step. */
function near(points, at) {
  return points.findLast(([step]) => step <= at) ?? points[0];
}

function nearest(numbers, wanted) {
  return numbers.reduce((best, number) => (Math.abs(number - wanted) < Math.abs(best - wanted) ? number : best), numbers[0]);
}
