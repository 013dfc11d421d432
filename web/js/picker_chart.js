// How much better than the untrained model every checkpoint is, on pictures kept out of training and on training pictures.
import { drawn, element } from "./dom.js";
import { MARGIN, Plot, gridLine, path, scale, stepLabel, stepTicks, ticks } from "./plot.js";
import { percent } from "./picker_words.js";

const STEP = /^step [\d,]+$/; // what a file of the training itself is called; others are averages of several

export class Chart extends Plot {
  /** `chosen` is called with the file that is clicked. */
  constructor(chosen) {
    super("How much better than the untrained model, by step");
    this.place.addEventListener("click", () => this.at && this.fileAt(this.at) && chosen(this.fileAt(this.at)));
    this.legend.title = "How much lower the loss is than the untrained model's, on pictures kept out of training and on those of the training.";
  }

  show(files, selected) {
    const same = this.selected === selected && JSON.stringify(files) === this.shown;
    if (same) return;
    this.selected = selected;
    this.shown = JSON.stringify(files);
    this.files = files.filter(({ broken }) => !broken).sort((one, other) => one.step - other.step);
    this.held = this.curve("percent");
    this.training = this.curve("training_percent");
    this.root.hidden = this.held.length + this.training.length < 3; // each begins at the untrained model
    if (!this.root.hidden) this.draw();
  }

  /** [step, percent] of the files of the training itself, from the untrained model on. */
  curve(key) {
    const files = this.files.filter((file) => isOfTraining(file) && file[key] != null);
    return files.length ? [[0, 0], ...files.map((file) => [file.step, file[key]])] : [];
  }

  draw() {
    const [width, height] = [this.place.clientWidth, this.place.clientHeight];
    if (!this.files || !width || !height) return;
    const x = scale([0, Math.max(1, ...this.files.map(({ step }) => step))], [MARGIN.left, width - MARGIN.right]);
    const levels = range([...this.held, ...this.training].map(([, level]) => level));
    const y = scale(levels, [height - MARGIN.bottom, MARGIN.top]);
    this.x = x;
    this.places = [...new Set(this.files.map(({ step }) => step))];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(
      ...this.safeParts(x, height),
      ...ticks(levels).flatMap((level) => gridLine(level, y(level), width, `${Math.round(level)} %`)),
      ...stepTicks(x.domain[1], width).map((at) => stepLabel(at, x(at), width, height)),
      drawn("line", { class: "lw-zero", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(0), y2: y(0) }),
      path("lw-learned", this.training, x, y),
      path("lw-kept-out", this.held, x, y),
      ...this.files.flatMap((file) => this.dots(file, x, y)),
      ...this.cursorParts(x, height),
    );
    this.describe();
  }

  /** The steps between which all files are as good within measuring error. */
  safeParts(x, height) {
    const steps = this.files.filter((file) => file.safe && isOfTraining(file)).map(({ step }) => step);
    if (steps.length < 2) return [];
    const [from, to] = [x(Math.min(...steps)), x(Math.max(...steps))];
    const place = { x: from - 4, width: to - from + 8, y: MARGIN.top, height: height - MARGIN.top - MARGIN.bottom };
    const words = drawn("title");
    words.textContent = "Equally good within measuring error";
    return [drawn("rect", { class: "lw-safe", rx: 3, ...place }, words)];
  }

  dots(file, x, y) {
    if (file.percent == null) return [];
    const kind = file.suggested ? "lw-suggested" : isOfTraining(file) ? "" : "lw-average";
    const place = { cx: x(file.step), cy: y(file.percent) };
    const around = file.lora === this.selected ? [drawn("circle", { class: "lw-selected-point", r: 7, ...place })] : [];
    return [...around, drawn("circle", { class: `lw-file-point ${kind}`, r: file.suggested ? 4.5 : 2.5, ...place })];
  }

  cursorParts(x, height) {
    if (this.at === undefined) return [];
    const place = x(this.at);
    return [drawn("line", { class: "lw-cursor", x1: place, x2: place, y1: MARGIN.top, y2: height - MARGIN.bottom })];
  }

  fileAt(step) {
    const files = this.files.filter((file) => file.step === step);
    return files.find(isOfTraining) ?? files[0];
  }

  /** The numbers at the chosen step, else of the suggested file. */
  describe() {
    const file = this.at === undefined ? this.files.find(({ suggested }) => suggested) : this.fileAt(this.at);
    const levels = [
      ["lw-kept-out", "held-out", file?.percent],
      ["lw-learned", "training", file?.training_percent],
    ].filter(([, , level]) => level != null);
    const parts = levels.map(([className, name, level]) =>
      element("span", { className: `lw-key ${className}` }, `${name} `, element("b", {}, percent(level))),
    );
    this.legend.replaceChildren(...(file ? [element("span", { className: "lw-at" }, file.label)] : []), ...parts);
    const said = levels.map(([, name, level]) => `${name} ${percent(level)}`).join(", ");
    this.svg.setAttribute("aria-label", `Compared with the untrained model, ${file?.label ?? ""}: ${said}`);
  }
}

function isOfTraining({ label }) {
  return STEP.test(label);
}

function range(levels) {
  const [low, high] = [Math.min(0, ...levels), Math.max(0, ...levels)];
  const room = (high - low || 1) * 0.1;
  return [low - room, high + room];
}
