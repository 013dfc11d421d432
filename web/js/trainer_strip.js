// The film strip: every preview from the untrained model on, and one of them large.
import { api } from "../../../scripts/api.js";
import { element } from "./dom.js";
import { count } from "./trainer_words.js";

const THUMBNAIL = "&preview=webp;75"; // ComfyUI makes it smaller on the way
const UNTRAINED = "untrained";

const titleOf = ({ step }) => (step ? `step ${count(step)}` : UNTRAINED);

export class Strip {
  constructor() {
    this.row = element("div", { className: "lw-strip", role: "listbox", "aria-label": "Previews", "aria-orientation": "horizontal" });
    this.choice = element("select", { "aria-label": "Prompt", onchange: () => this.fill() });
    this.root = element("div", { className: "lw-previews" }, this.choice, this.row);
    this.row.addEventListener("keydown", (event) => this.key(event));
    this.viewer = new Viewer();
    this.previews = [];
    this.frames = new Map();
  }

  show({ previews }) {
    this.root.hidden = !previews.length;
    if (previews.length === this.previews.length && previews.every((one, at) => same(one, this.previews[at]))) return;
    this.previews = previews;
    const prompts = [...new Set(previews.map(({ prompt }) => prompt))];
    const chosen = this.choice.value;
    this.choice.replaceChildren(...prompts.map((prompt) => element("option", { value: prompt }, prompt || "Earlier prompts")));
    if (prompts.includes(chosen)) this.choice.value = chosen;
    this.choice.hidden = prompts.length < 2;
    this.fill();
  }

  get shown() {
    return this.previews.filter(({ prompt }) => prompt === this.choice.value);
  }

  /** The frames of the chosen prompt; those that are there already stay, so that nothing flickers. */
  fill() {
    const atEnd = this.row.scrollLeft + this.row.clientWidth >= this.row.scrollWidth - 8;
    const frames = this.shown.map((preview) => [preview.url, this.frames.get(preview.url) ?? this.frame(preview)]);
    this.frames = new Map(frames);
    const wanted = frames.map(([, frame]) => frame);
    for (const child of [...this.row.children]) if (!wanted.includes(child)) child.remove();
    wanted.forEach((frame, at) => this.row.children[at] === frame || this.row.insertBefore(frame, this.row.children[at] ?? null));
    wanted.forEach((frame, at) => (frame.tabIndex = at ? -1 : 0));
    if (atEnd) this.row.scrollLeft = this.row.scrollWidth;
  }

  frame(preview) {
    const image = element("img", { alt: "", loading: "lazy", decoding: "async", src: api.apiURL(preview.url + THUMBNAIL) });
    const title = titleOf(preview);
    return element(
      "button",
      {
        type: "button",
        className: "lw-frame",
        role: "option",
        title: preview.prompt ? `${title}: ${preview.prompt}` : title,
        "aria-label": `Preview, ${title}`,
        onclick: () => this.viewer.open(this.previews, preview),
      },
      image,
      element("span", {}, title),
    );
  }

  key(event) {
    const frames = [...this.row.children];
    const at = frames.indexOf(event.target);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: frames.length - 1 }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    frames[next]?.focus();
  }
}

/** One preview, large; arrow keys go to other steps and prompts. */
class Viewer {
  constructor() {
    this.image = element("img", { alt: "" });
    this.title = element("b", {});
    this.prompt = element("span", {});
    const step = (text, label, by) =>
      element("button", { type: "button", title: label, "aria-label": label, onclick: () => this.move(by, 0) }, text);
    const close = element("button", { type: "button", title: "Close (Escape)", "aria-label": "Close", onclick: () => this.root.close() }, "×");
    this.root = element(
      "dialog",
      { className: "lw-viewer", "aria-label": "Preview" },
      element("div", { className: "lw-viewer-picture" }, this.image),
      element(
        "div",
        { className: "lw-viewer-line", "aria-live": "polite" },
        step("‹", "Earlier step (left arrow)", -1),
        step("›", "Later step (right arrow)", 1),
        this.title,
        this.prompt,
        close,
      ),
    );
    this.root.addEventListener("click", (event) => event.target === this.root && this.root.close());
    this.root.addEventListener("close", () => this.root.remove());
    this.root.addEventListener("keydown", (event) => this.key(event));
    // ComfyUI and the graph listen to the whole page: what is typed here is not for them.
    for (const kind of ["keydown", "keyup", "keypress", "wheel"])
      this.root.addEventListener(kind, (event) => event.stopPropagation());
  }

  open(previews, preview) {
    this.previews = previews;
    document.body.append(this.root);
    this.show(preview);
    this.root.showModal();
  }

  show(preview) {
    this.preview = preview;
    this.image.src = api.apiURL(preview.url);
    this.image.alt = preview.prompt || titleOf(preview);
    this.title.textContent = titleOf(preview);
    this.prompt.textContent = preview.prompt;
  }

  /** So many steps further, and so many prompts; stays where it is at the ends. */
  move(steps, prompts) {
    const names = [...new Set(this.previews.map(({ prompt }) => prompt))];
    const name = names[names.indexOf(this.preview.prompt) + prompts];
    const row = this.previews.filter(({ prompt }) => prompt === name);
    if (!row.length) return;
    const here = prompts ? row.findIndex(({ step }) => step >= this.preview.step) : row.indexOf(this.preview);
    const next = row.at(here < 0 ? -1 : Math.max(0, Math.min(here + steps, row.length - 1)));
    this.show(next);
  }

  key(event) {
    const [steps, prompts] =
      { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    const far = { Home: -Infinity, End: Infinity }[event.key];
    if (steps === undefined && far === undefined) return;
    event.preventDefault();
    this.move(far ?? steps, prompts ?? 0);
  }
}

function same(one, other) {
  return one.url === other.url && one.prompt === other.prompt;
}
