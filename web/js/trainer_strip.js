// The film strip: every preview from the untrained model on, and one of them large.
import { api } from "../../../scripts/api.js";
import { element, fill } from "./dom.js";
import { Viewer } from "./viewer.js";
import { count } from "./words.js";

const THUMBNAIL = "&preview=webp;75"; // ComfyUI makes it smaller on the way
const UNTRAINED = "untrained";

const titleOf = ({ step }) => (step ? `step ${count(step)}` : UNTRAINED);

export class Strip {
  constructor() {
    this.row = element("div", { className: "lw-strip", role: "listbox", "aria-label": "Previews", "aria-orientation": "horizontal" });
    this.choice = element("select", { "aria-label": "Prompt", onchange: () => this.fill() });
    this.root = element("div", { className: "lw-previews" }, this.choice, this.row);
    this.row.addEventListener("keydown", (event) => this.key(event));
    this.viewer = new Viewer("Preview", "step");
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
    fill(this.row, wanted);
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
        onclick: () => this.enlarge(preview),
      },
      image,
      element("span", {}, title),
    );
  }

  enlarge(chosen) {
    const pictures = this.previews.map((preview) => {
      const { url, step, prompt } = preview;
      return { url, row: prompt, at: step, title: titleOf(preview), caption: prompt };
    });
    this.viewer.open(pictures, pictures[this.previews.indexOf(chosen)]);
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

function same(one, other) {
  return one.url === other.url && one.prompt === other.prompt;
}
