// Pictures in rows and columns, with labels that stay in sight.
import { api } from "../../../scripts/api.js";
import { element, fill, write } from "./dom.js";

const THUMBNAIL = "&preview=webp;75"; // ComfyUI makes it smaller on the way

/**
 * Shows a table {columns: [{key, label, said, note, base, chosen}], rows: [{key, title, frames}]}, a frame being null where
 * there is no picture yet, else {key, url, title, badge, base, chosen}. `base` ones are what others are compared with. What stays the same stays in the page.
 */
export class Grid {
  /** `opened` is called with the key of a picture that is clicked. */
  constructor(opened) {
    this.opened = opened;
    this.table = element("div", { className: "lw-pick-table" });
    this.root = element("div", { className: "lw-pick-grid", role: "group", "aria-label": "Pictures", "data-capture-wheel": "true" }, this.table);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.made = new Map();
  }

  show(table) {
    const text = JSON.stringify(table);
    if (text === this.shown) return;
    this.shown = text;
    this.rows = table.rows;
    this.used = new Map();
    const heads = table.columns.map((column) => this.head(column));
    const wide = Math.max(1, ...table.rows.map(({ frames }) => frames.length));
    const rows = table.rows.flatMap((row, at) => [this.label(row), ...row.frames.map((frame, place) => this.frame(frame, at, place))]);
    this.table.style.setProperty("--lw-columns", wide);
    fill(this.table, [...heads, ...rows]);
    this.made = this.used;
    const first = this.table.querySelector("button");
    if (first && !this.table.querySelector('button[tabindex="0"]')) first.tabIndex = 0;
  }

  /** The part of the page that has this key, made when there is none yet. */
  part(key, make) {
    const made = this.made.get(key) ?? make();
    this.used.set(key, made);
    return made;
  }

  head({ key, label, said, note, base, chosen }) {
    const made = this.part(`head ${key}`, () => element("div", { className: "lw-pick-head" }, element("b", {}), element("span", {})));
    write(made.firstChild, label);
    write(made.lastChild, note);
    made.title = said;
    made.classList.toggle("lw-chosen", chosen);
    made.classList.toggle("lw-pick-base", base);
    return made;
  }

  label({ key, title }) {
    const made = this.part(`row ${key}`, () => element("div", { className: "lw-pick-row" }, element("span", {})));
    write(made.firstChild, title);
    made.title = title;
    return made;
  }

  frame(frame, row, place) {
    if (!frame) return this.part(`empty ${row} ${place}`, () => element("div", { className: "lw-pick-empty" }));
    const made = this.part(frame.key, () => this.newFrame(frame.key));
    const [image, badge] = made.children;
    const address = api.apiURL(frame.url + THUMBNAIL);
    if (image.getAttribute("src") !== address) image.src = address;
    write(badge, frame.badge);
    badge.hidden = !frame.badge;
    const said = `${frame.title}, ${this.rows[row].title}`;
    if (made.title !== frame.title) made.title = frame.title;
    if (made.getAttribute("aria-label") !== said) made.setAttribute("aria-label", said);
    made.setAttribute("aria-pressed", String(frame.chosen));
    made.classList.toggle("lw-chosen", frame.chosen);
    made.classList.toggle("lw-pick-base", frame.base);
    return made;
  }

  newFrame(key) {
    const image = element("img", { alt: "", loading: "lazy", decoding: "async" });
    const onclick = () => this.opened(key);
    return element("button", { type: "button", className: "lw-pick-frame", tabIndex: -1, onclick }, image, element("span", {}));
  }

  /** The arrow keys go from picture to picture. */
  key(event) {
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    const keys = this.rows?.map(({ frames }) => frames.map((frame) => frame?.key)) ?? [];
    const row = keys.findIndex((row) => row.some((key) => key && this.made.get(key) === event.target));
    if (right === undefined || row < 0) return;
    event.preventDefault();
    event.stopPropagation();
    const place = keys[row].findIndex((key) => this.made.get(key) === event.target);
    const next = this.made.get(keys[row + down]?.[place + right]);
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
