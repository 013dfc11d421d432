// The caption review: pictures and captions of one folder in a dialog that can be worked by keyboard alone.
import { Refused, ReviewApi } from "./review_api.js";
import { addStyle, button, element } from "./review_dom.js";
import { Editor } from "./review_editor.js";
import { Filters } from "./review_filters.js";
import { Grid } from "./review_grid.js";
import { ReplacePanel } from "./review_replace.js";
import { areTags, tagsOf } from "./review_text.js";

const KEYS = [
  ["Ctrl+Enter", "accept and next"],
  ["Alt+↓ ↑", "next, previous"],
  ["Ctrl+S", "save"],
  ["Ctrl+Z", "undo"],
  ["Ctrl+F", "filter"],
  ["Ctrl+H", "find and replace"],
  ["Esc", "close"],
];

/** Opens the review of the first of these folders, [{folder, …}, …]; the others can be chosen in it. */
export async function openReview(folders) {
  const review = new ReviewDialog(folders);
  await review.load(folders[0]);
  review.open();
}

class ReviewDialog {
  constructor(folders) {
    this.folders = folders;
    this.limit = 75;
    this.pictures = [];
    this.editor = new Editor(this);
    this.replacing = new ReplacePanel(this);
    this.grid = new Grid(this);
    this.filters = new Filters(this);
    this.message = element("p", { className: "lw-message", role: "status" });
    this.folderName = element("span", { className: "lw-folder" });
    this.undoButton = button("Undo", "Take back the last change of caption files (Ctrl+Z)", () => this.undo());
    const parts = [this.filters.cloud, this.grid.root, this.editor.root, this.replacing.root];
    this.root = element(
      "dialog",
      { className: "lw-review", role: "dialog", "aria-modal": "true", "aria-labelledby": "lw-review-title" },
      this.header(),
      this.filters.states,
      element("div", { className: "lw-body" }, ...parts),
      this.footer(),
    );
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("cancel", (event) => event.preventDefault()); // Escape is handled with the other keys
    // ComfyUI and the graph listen to the whole page: what is typed or pasted here is not for them.
    for (const kind of ["keydown", "keyup", "keypress", "copy", "cut", "paste"])
      this.root.addEventListener(kind, (event) => event.stopPropagation());
  }

  header() {
    const title = element("h2", { id: "lw-review-title" }, "Review captions");
    const choice = element("select", { "aria-label": "Folder", onchange: () => this.change(choice.selectedIndex) });
    choice.append(...this.folders.map(({ folder }) => element("option", {}, folder)));
    const replace = button("Find and replace", "In all captions of the folder (Ctrl+H)", () => this.showReplacing());
    const close = button("×", "Close (Escape)", () => this.close(), "lw-close");
    close.setAttribute("aria-label", "Close");
    const folder = this.folders.length > 1 ? choice : this.folderName;
    return element("header", {}, title, folder, this.filters.search, replace, this.undoButton, close);
  }

  footer() {
    const keys = KEYS.map(([key, does]) => element("span", {}, element("kbd", {}, key), ` ${does}`));
    return element("footer", {}, this.message, element("div", { className: "lw-keys" }, ...keys));
  }

  // The folder

  async load(asked) {
    const api = new ReviewApi(asked);
    await api.open();
    this.api = api;
    this.folderName.textContent = api.folder.split(/[\\/]/).at(-1);
    this.folderName.title = api.folder;
    await this.refresh();
  }

  /** Reads every picture and caption of the folder again. */
  async refresh() {
    const { pictures, limit, undo, note } = await this.api.ask("pictures");
    Object.assign(this, { pictures, limit });
    this.byName = new Map(pictures.map((picture) => [picture.name, picture]));
    this.tags = areTags(pictures.map((picture) => picture.caption));
    for (const picture of pictures) picture.tags = tagsOf(picture.caption, this.tags);
    this.grid.fill(pictures);
    this.canUndo(undo);
    this.say(note);
    const first = pictures.find((picture) => picture.state !== "reviewed") ?? pictures[0];
    this.chosen = this.byName.has(this.chosen) ? this.chosen : first?.name;
    this.render();
    this.showChosen();
  }

  async change(index) {
    if (!(await this.leave())) return;
    await this.attempt(() => this.load(this.folders[index]));
  }

  open() {
    addStyle();
    document.body.append(this.root);
    this.root.showModal();
    this.editor.focus();
  }

  async close() {
    if (!(await this.leave())) return;
    this.root.close();
    this.root.remove();
  }

  // Choosing a picture

  render() {
    this.shown = this.pictures.filter((picture) => this.filters.passes(picture));
    this.filters.render(this.pictures, this.shown);
    this.grid.show(new Set(this.shown.map((picture) => picture.name)), this.chosen);
  }

  /** Makes a picture the chosen one, once what was typed for the last one is saved. */
  async choose(name, andEdit = false) {
    if (name !== this.chosen) {
      if (!(await this.leave())) return;
      this.chosen = name;
      this.showChosen();
      this.render();
    }
    if (andEdit) this.edit();
  }

  /** Shows the chosen picture at once, and what its caption was before as soon as the server has looked. */
  showChosen() {
    const picture = this.byName.get(this.chosen);
    this.editor.show(picture ?? null);
    if (!picture) return;
    const compare = ({ caption, previous }) => {
      if (this.editor.picture === picture && caption === picture.caption) this.editor.compareWith(previous);
    };
    const asked = this.api.ask(`caption?${new URLSearchParams({ name: picture.name })}`);
    asked.then(compare, (error) => this.say(error.message, true));
  }

  edit() {
    this.showEditor();
    this.editor.focus();
  }

  async step(by) {
    const names = this.shown.map((picture) => picture.name);
    const place = names.indexOf(this.chosen);
    const next = names[place < 0 ? 0 : place + by];
    if (next) await this.choose(next, true);
  }

  // Changing captions

  /** Saves what was typed; false when it could not be, and the text stays where it is. */
  async leave() {
    if (!this.editor.changed) return true;
    if (this.editor.text.value.trim()) return await this.save();
    this.editor.reset();
    this.say("An empty caption is not saved: the one before is kept.");
    return true;
  }

  async save(reviewed = false) {
    const { picture, text } = this.editor;
    if (!text.value.trim()) return this.say("Write a caption first.", true);
    const saved = { name: picture.name, caption: text.value, seen: picture.caption, reviewed };
    return await this.attempt(async () => {
      const answer = await this.api.ask("caption", saved);
      this.changed([answer.picture], `${reviewed ? "Accepted" : "Saved"} ${picture.name}.`, answer.undo);
    });
  }

  /** Saves the caption as reviewed and goes to the next picture that is not, in the order shown. */
  async accept() {
    const place = this.shown.findIndex((picture) => picture.name === this.chosen);
    const order = [...this.shown.slice(place + 1), ...this.shown.slice(0, Math.max(place, 0))];
    if (!(await this.save(true))) return;
    const next = order.find((picture) => this.byName.get(picture.name).state !== "reviewed");
    if (next) await this.choose(next.name, true);
    else this.say("Every caption shown is reviewed.");
  }

  async undo() {
    await this.attempt(async () => {
      const { pictures, kept, undo } = await this.api.ask("undo", {});
      const names = pictures.length === 1 ? pictures[0].name : `${pictures.length} captions`;
      const edited = kept.length ? ` Kept, because edited since: ${kept.join(", ")}.` : "";
      const found = pictures.length + kept.length;
      this.changed(pictures, found ? `Took back the change of ${names}.${edited}` : "Nothing to undo.", undo);
      if (pictures.length === 1) await this.choose(pictures[0].name, true);
    });
  }

  /** Takes over what the server says these pictures' captions are now. */
  changed(pictures, message, undo = true) {
    for (const picture of pictures) {
      Object.assign(this.byName.get(picture.name) ?? {}, picture, { tags: tagsOf(picture.caption, this.tags) });
      this.grid.update(picture);
    }
    if (pictures.some(({ name }) => name === this.chosen)) this.showChosen();
    this.canUndo(undo);
    this.render();
    this.say(message);
  }

  async counted(caption) {
    return (await this.api.ask("tokens", { name: this.chosen, caption })).tokens;
  }

  /** Whether `work` was done; where the server refused, its sentence is shown. */
  async attempt(work) {
    try {
      await work();
      return true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.picture) this.conflict(error.picture);
      this.say(error.message, true);
      return false;
    }
  }

  /** The file was changed meanwhile: show that beside what was typed, which a second save puts in its place. */
  conflict(picture) {
    const typed = this.editor.text.value;
    this.changed([picture], "");
    this.editor.text.value = typed;
    this.editor.typed();
  }

  canUndo(possible) {
    this.undoButton.disabled = !possible;
  }

  say(text, isError = false) {
    this.message.textContent = text ?? "";
    this.message.classList.toggle("lw-error", isError);
  }

  // The right-hand side, and keys

  async showReplacing() {
    if (!(await this.leave())) return;
    this.editor.root.hidden = true;
    this.replacing.root.hidden = false;
    this.replacing.open();
  }

  showEditor() {
    this.replacing.root.hidden = true;
    this.editor.root.hidden = false;
  }

  key(event) {
    const does = this.meaning(event);
    if (!does) return this.keepFocus(event);
    event.preventDefault();
    does();
  }

  meaning({ key, ctrlKey, metaKey, altKey, shiftKey }) {
    const control = (ctrlKey || metaKey) && !altKey;
    if (key === "Escape") return () => (this.replacing.root.hidden ? this.close() : this.edit());
    if (altKey && key === "ArrowDown") return () => this.step(1);
    if (altKey && key === "ArrowUp") return () => this.step(-1);
    if (!control || shiftKey) return null;
    if (key === "z") return this.typing() ? null : () => this.undo();
    const keys = {
      Enter: () => this.accept(),
      s: () => this.save(),
      f: () => this.filters.search.focus(),
      h: () => this.showReplacing(),
    };
    return keys[key];
  }

  /** Whether Ctrl+Z belongs to a text field, because something was typed in it. */
  typing() {
    const field = document.activeElement;
    return field === this.editor.text ? this.editor.changed : field.tagName === "INPUT" && field.value !== "";
  }

  /** Tab goes round inside the dialog. */
  keepFocus(event) {
    if (event.key !== "Tab") return;
    const all = [...this.root.querySelectorAll("button, input, select, textarea, [tabindex='0']")];
    const reachable = all.filter((one) => !one.disabled && one.offsetParent !== null);
    const [from, to] = event.shiftKey ? [reachable[0], reachable.at(-1)] : [reachable.at(-1), reachable[0]];
    if (document.activeElement !== from) return;
    event.preventDefault();
    to.focus();
  }
}
