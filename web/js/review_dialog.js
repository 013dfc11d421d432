// The caption review: pictures and captions of one folder in a dialog that can be worked by keyboard alone.
import { addStyle, element } from "./dom.js";
import { Refused, ReviewApi } from "./review_api.js";
import { button, enable } from "./review_dom.js";
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
    this.last = Promise.resolve();
    this.editor = new Editor(this);
    this.replacing = new ReplacePanel(this);
    this.grid = new Grid(this);
    this.filters = new Filters(this);
    this.message = element("p", { className: "lw-message", role: "status" });
    this.folderName = element("span", { className: "lw-folder" });
    this.undoButton = button("Undo", "Take back the last change of caption files (Ctrl+Z)", () => this.undo());
    const title = element("h2", { id: "lw-review-title" }, "Review captions");
    const parts = [this.filters.cloud, this.grid.root, this.editor.root, this.replacing.root];
    this.root = element(
      "dialog",
      { className: "lw-review", role: "dialog", "aria-modal": "true", "aria-labelledby": title.id, tabIndex: -1 },
      this.header(title),
      this.filters.states,
      element("div", { className: "lw-body" }, ...parts),
      this.footer(),
    );
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("close", () => this.root.remove());
    this.root.addEventListener("cancel", (event) => {
      event.preventDefault(); // what was typed is saved first
      this.escape();
    });
    // ComfyUI and the graph listen to the whole page: what is typed or pasted here is not for them.
    for (const kind of ["keydown", "keyup", "keypress", "copy", "cut", "paste"])
      this.root.addEventListener(kind, (event) => event.stopPropagation());
  }

  header(title) {
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
    await this.leave();
    await this.attempt(() => this.load(this.folders[index]));
  }

  open() {
    addStyle("review.css");
    document.body.append(this.root);
    this.root.showModal();
    this.editor.focus();
  }

  async close() {
    await this.leave();
    const unsaved = this.pictures.filter(({ draft }) => draft !== undefined).map(({ name }) => name);
    if (unsaved.length && !confirm(`Not saved: ${unsaved.join(", ")}. Close and lose what was typed?`)) return;
    this.root.close();
  }

  // Choosing a picture

  render() {
    this.shown = this.pictures.filter((picture) => this.filters.passes(picture));
    this.filters.render(this.pictures, this.shown);
    this.grid.show(new Set(this.shown.map((picture) => picture.name)), this.chosen);
  }

  /** Makes a picture the chosen one; what was typed for the last one is saved meanwhile. */
  choose(name, andEdit = false) {
    if (name !== this.chosen) {
      this.leave();
      this.chosen = name;
      this.showChosen();
      this.render();
    }
    if (andEdit) this.edit();
  }

  showChosen() {
    this.editor.show(this.byName.get(this.chosen) ?? null);
    this.lookBack();
  }

  /** Shows what the chosen picture's caption was before its last change, as soon as the server has looked. */
  async lookBack() {
    const { picture } = this.editor;
    if (!picture) return;
    await this.attempt(async () => {
      if (picture !== this.editor.picture) return; // gone on meanwhile
      const { caption, previous } = await this.api.ask(`caption?${new URLSearchParams({ name: picture.name })}`);
      if (picture === this.editor.picture && caption === picture.caption) this.editor.compareWith(previous);
    });
  }

  edit() {
    this.showEditor();
    this.editor.focus();
  }

  step(by) {
    const names = this.shown.map((picture) => picture.name);
    const place = names.indexOf(this.chosen);
    const next = names[place < 0 ? 0 : place + by];
    if (next) this.choose(next, true);
  }

  // Changing captions

  /** Saves what was typed for the chosen picture. */
  async leave() {
    if (!this.editor.changed) return;
    if (this.editor.caption) return await this.save();
    this.editor.restore();
    this.say("An empty caption is not saved: the one before is kept.");
  }

  /** Saves the caption; until the server has it, or when it refuses, the picture keeps it as its draft. */
  save(reviewed = false) {
    const { picture, caption } = this.editor;
    if (!caption) return this.say("Write a caption first.", true);
    picture.draft = caption;
    return this.attempt(async () => {
      const saved = { name: picture.name, caption, seen: picture.caption, reviewed };
      const answer = await this.api.ask("caption", saved);
      if (picture.draft === caption) delete picture.draft;
      this.changed([answer.picture], `${reviewed ? "Accepted" : "Saved"} ${picture.name}.`, answer.undo);
    });
  }

  /** Saves the caption as reviewed and goes to the next picture that is not, in the order shown. */
  async accept() {
    if (!this.editor.caption) return this.say("Write a caption first.", true);
    const place = this.shown.findIndex((picture) => picture.name === this.chosen);
    const order = [...this.shown.slice(place + 1), ...this.shown.slice(0, Math.max(place, 0))];
    const next = order.find(({ state, draft }) => state !== "reviewed" && draft === undefined);
    const saved = this.save(true);
    if (next) this.choose(next.name, true);
    if ((await saved) && !next) this.say("Every caption shown is reviewed.");
  }

  async undo() {
    await this.leave();
    await this.attempt(async () => {
      const { pictures, kept, undo } = await this.api.ask("undo", {});
      const names = pictures.length === 1 ? pictures[0].name : `${pictures.length} captions`;
      const edited = kept.length ? ` Kept, because edited since: ${kept.join(", ")}.` : "";
      const found = pictures.length + kept.length;
      this.changed(pictures, found ? `Took back the change of ${names}.${edited}` : "Nothing to undo.", undo);
      if (pictures.length === 1) this.choose(pictures[0].name, true);
    });
  }

  /** Takes over what the server says these pictures' captions are now. */
  changed(pictures, message, undo = true) {
    for (const picture of pictures) {
      const known = this.byName.get(picture.name);
      if (!known) continue; // added to the folder since it was opened
      Object.assign(known, picture, { tags: tagsOf(picture.caption, this.tags) });
      this.grid.update(known);
      if (known === this.editor.picture) this.editor.refresh();
    }
    if (pictures.some(({ name }) => name === this.chosen)) this.lookBack();
    this.canUndo(undo);
    this.render();
    this.say(message);
  }

  /** How many tokens the picture has with that caption; NaN when the server does not say. */
  async counted(name, caption) {
    const answer = await this.api.ask("tokens", { name, caption }).catch((error) => this.refused(error));
    return answer?.tokens ?? NaN;
  }

  /** Does one thing after the other; true when it was done. Where the server refused, its sentence is shown. */
  attempt(work) {
    this.last = this.last.then(async () => {
      try {
        await work();
        return true;
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        this.refused(error);
        return false;
      }
    });
    return this.last;
  }

  /** A caption that changed on the disk meanwhile is shown beside the draft, which a second save puts in its place. */
  refused({ message, picture }) {
    if (picture) this.changed([picture], "");
    for (const unsaved of this.pictures.filter(({ draft }) => draft !== undefined)) this.grid.update(unsaved);
    this.say(message, true);
  }

  canUndo(possible) {
    enable(this.undoButton, possible);
  }

  say(text, isError = false) {
    this.message.textContent = text ?? "";
    this.message.classList.toggle("lw-error", isError);
  }

  // The right-hand side, and keys

  async showReplacing() {
    await this.leave();
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

  meaning({ key, ctrlKey, metaKey, altKey, shiftKey, repeat }) {
    const control = (ctrlKey || metaKey) && !altKey;
    if (key === "Escape") return () => this.escape();
    if (altKey && key === "ArrowDown") return () => this.step(1);
    if (altKey && key === "ArrowUp") return () => this.step(-1);
    if (!control || shiftKey) return null;
    if (key === "z") return this.typing() ? null : () => this.undo();
    const keys = {
      Enter: () => repeat || this.accept(),
      s: () => this.save(),
      f: () => this.filters.search.focus(),
      h: () => this.showReplacing(),
    };
    return keys[key];
  }

  escape() {
    if (this.replacing.root.hidden) this.close();
    else this.edit();
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
