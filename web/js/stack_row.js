// One LoRA of the stack: a line that is dragged, switched, named, weighed and removed, and what lies behind it.
import { button, element, write } from "./dom.js";
import { Details } from "./stack_details.js";
import { aboutFile, partsOf } from "./stack_files.js";
import { icon } from "./stack_icons.js";
import { Strength } from "./stack_number.js";
import { foundWords } from "./stack_words.js";

const NO_STRENGTH = 1; // where a file recommends none

export class Row {
  /** `acts` are what the panel does for a row: changed, remove, choose, grab and move. */
  constructor(row, acts) {
    this.row = row;
    this.acts = acts;
    this.separate = row.model !== row.clip;
    this.recommended = NO_STRENGTH;
    this.unusable = false;
    this.handle = button("", "Drag to another place, or press the up and down arrow keys.", () => {}, "lw-handle");
    this.handle.setAttribute("aria-label", "Move");
    this.on = button("", "Switch this LoRA on or off.", () => this.change({ on: !row.on }), "lw-switch");
    this.on.setAttribute("role", "switch");
    this.name = button("", "", () => acts.choose(this), "lw-lora");
    this.model = new Strength("Strength for the model", (model) => this.change(this.separate ? { model } : { model, clip: model }));
    this.clip = new Strength("Strength for the CLIP", (clip) => this.change({ clip }));
    this.link = button("", "", () => this.toggleLink(), "lw-sign");
    this.more = button("", "Trigger words, facts and blocks", () => this.toggleDetails(), "lw-sign lw-more");
    // The second click of a double click falls on the row that has moved up.
    const once = (event) => event.detail > 1 || acts.remove(this);
    this.remove = button("", "Remove this LoRA from the stack.", once, "lw-sign lw-remove");
    this.remove.setAttribute("aria-label", "Remove");
    this.handle.append(icon("handle"));
    this.more.append(icon("more"));
    this.remove.append(icon("remove"));
    this.note = element("p", { className: "lw-row-note" });
    this.details = new Details((change) => this.change(change));
    const line = [this.handle, this.on, this.name, this.model.root, this.link, this.clip.root, this.more, this.remove];
    const parts = [element("div", { className: "lw-row-line" }, ...line), this.note, this.details.root];
    this.root = element("div", { className: "lw-stack-row", role: "listitem" }, ...parts);
    this.details.root.hidden = true;
    this.handle.addEventListener("pointerdown", (event) => acts.grab(this, event));
    this.handle.addEventListener("keydown", (event) => this.key(event));
  }

  change(values) {
    Object.assign(this.row, values);
    this.acts.changed();
  }

  /** Takes over the values of a row of the same file. */
  take(row) {
    Object.assign(this.row, row);
    this.separate ||= row.model !== row.clip;
  }

  show() {
    const { row } = this;
    const { file, folder } = partsOf(row.lora);
    if (this.name.title !== row.lora) {
      this.name.title = row.lora;
      this.name.replaceChildren(element("span", { className: "lw-folder-name" }, folder), element("b", {}, file));
    }
    this.root.setAttribute("aria-label", file);
    this.root.classList.toggle("lw-off", !row.on);
    this.on.setAttribute("aria-checked", String(row.on));
    this.on.setAttribute("aria-label", `${file} on`);
    this.showStrengths();
    this.describe(row.lora);
  }

  showStrengths() {
    const { row, separate } = this;
    this.model.show(row.model, this.recommended);
    this.clip.show(row.clip, this.recommended);
    this.clip.root.hidden = !separate;
    const sign = separate ? "separate" : "linked";
    if (this.link.dataset.sign !== sign) this.link.replaceChildren(icon(sign));
    this.link.dataset.sign = sign;
    this.link.setAttribute("aria-pressed", String(separate));
    this.link.title = separate ? "Give the CLIP the same strength as the model." : "Give the CLIP a strength of its own.";
    this.link.setAttribute("aria-label", "Separate strength for the CLIP");
  }

  /** What the file says about itself, as soon as the server has looked. */
  async describe(name) {
    const about = await aboutFile(name);
    if (name !== this.row.lora) return; // another one was chosen meanwhile
    this.unusable = Boolean(about.gone || (about.name && about.error));
    const moved = about.name && plain(about.name) !== plain(name);
    write(this.note, about.error || (moved ? foundWords(about.name) : ""));
    this.note.hidden = !this.note.textContent;
    this.root.classList.toggle("lw-unusable", this.unusable);
    this.details.show(this.row, about.error ? null : about);
    this.recommended = about.strength ?? NO_STRENGTH;
    this.showStrengths();
    this.acts.described();
  }

  /** The strength that the model is given. */
  get strength() {
    return this.row.model ?? this.recommended;
  }

  toggleLink() {
    this.separate = !this.separate;
    if (this.separate) this.acts.described();
    else this.change({ clip: this.row.model });
    this.showStrengths();
  }

  toggleDetails(open = this.details.root.hidden) {
    this.details.root.hidden = !open;
    this.more.setAttribute("aria-expanded", String(open));
    this.acts.described();
  }

  key(event) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    this.acts.move(this, by);
  }
}

/** A name as it is whichever system has written it. */
const plain = (name) => name.replaceAll("\\", "/").toLowerCase();
