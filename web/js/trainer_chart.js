// The loss and the learning rate of a training.
import { drawn, element } from "./dom.js";
import { MARGIN, Plot, gridLine, near, path, scale, stepLabel, stepTicks, ticks } from "./plot.js";
import { count, value } from "./words.js";

const RATE_HEIGHT = 18;

export class Chart extends Plot {
  constructor() {
    super("Loss by step");
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
  }
}

/** How many steps the axis shows: all, or of a training that has just begun a half, a quarter and so on. */
function shownSteps(step, total) {
  let most = Math.max(total ?? 0, step, 1);
  while (most >= 40 && most / 2 >= step) most /= 2;
  return most;
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
