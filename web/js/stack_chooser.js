// A LoRA is chosen here, over the page: type to filter, with the cover and the words of the one that is marked.
import { api } from "../../../scripts/api.js";
import { element, fill, write } from "./dom.js";
import { aboutFile, partsOf } from "./stack_files.js";
import { icon } from "./stack_icons.js";
import { inWindow } from "./stack_window.js";
import { factsOf, strengthText } from "./stack_words.js";

const MOST = 400; // lines; more are found by typing
const PAGE = 8; // lines that Page Up and Page Down go

export class Chooser {
  constructor() {
    this.search = element("input", { type: "search", className: "lw-find", placeholder: "Type to find a LoRA", "aria-label": "Find a LoRA", spellcheck: false });
    this.list = element("div", { className: "lw-found", role: "listbox", "aria-label": "LoRA files", id: "lw-found" });
    this.more = element("p", { className: "lw-more-files" });
    this.card = element("div", { className: "lw-file-card" });
    const field = element("label", { className: "lw-find-line" }, icon("search"), this.search);
    const found = element("div", { className: "lw-found-box" }, this.list, this.more);
    this.root = element("dialog", { className: "lw-window lw-chooser", "aria-label": "Choose a LoRA" }, field, element("div", { className: "lw-chooser-body" }, found, this.card));
    this.search.setAttribute("role", "combobox");
    this.search.setAttribute("aria-controls", this.list.id);
    this.search.addEventListener("input", () => this.filter());
    this.covers = new IntersectionObserver((entries) => this.showCovers(entries), { root: this.list });
    inWindow(this.root);
    this.root.addEventListener("keydown", (event) => this.key(event));
  }

  /** Shows these names, the current one marked; `chosen` is called with the one that is chosen. */
  open(names, current, chosen) {
    this.names = names;
    this.chosen = chosen;
    this.marked = current;
    this.search.value = "";
    document.body.append(this.root);
    this.root.showModal();
    this.filter();
    this.search.focus();
  }

  close() {
    if (this.root.open) this.root.close();
  }

  /** The names in which every word that was typed occurs, in their folders. */
  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (name) => words.every((word) => name.toLowerCase().includes(word));
    const found = this.names.filter(fits);
    this.shown = inFolders(found.slice(0, MOST));
    this.covers.disconnect();
    this.options = new Map();
    const lines = this.shown.flatMap(([folder, files]) => [
      ...(folder ? [element("div", { className: "lw-found-folder", role: "presentation" }, folder)] : []),
      ...files.map((name) => this.option(name)),
    ]);
    fill(this.list, lines);
    for (const made of this.options.values()) this.covers.observe(made);
    write(this.more, this.moreWords(found.length));
    this.more.hidden = !this.more.textContent;
    this.mark(this.options.has(this.marked) ? this.marked : [...this.options.keys()][0]);
  }

  moreWords(found) {
    if (!this.names.length) return "The loras folder is empty: put LoRA files there, then press R on the graph.";
    if (!found) return "No LoRA is called so.";
    return found > MOST ? `${found - MOST} more: type to find them.` : "";
  }

  option(name) {
    const { file } = partsOf(name);
    const cover = element("span", { className: "lw-found-cover" }, initial(file));
    const made = element("div", { className: "lw-found-file", role: "option", title: name, onclick: () => this.take(name) }, cover, element("span", {}, file));
    made.id = `lw-found-${this.options.size}`;
    made.dataset.name = name;
    made.addEventListener("pointermove", () => this.marked === name || this.mark(name, false));
    this.options.set(name, made);
    return made;
  }

  /** Fetches the covers of the lines that come into sight. */
  showCovers(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.covers.unobserve(target);
      aboutFile(target.dataset.name).then(({ preview }) => {
        if (preview) target.firstChild.replaceChildren(element("img", { alt: "", src: api.apiURL(preview) }));
      });
    }
  }

  mark(name, scroll = true) {
    this.options.get(this.marked)?.setAttribute("aria-selected", "false");
    this.marked = name;
    const made = this.options.get(name);
    made?.setAttribute("aria-selected", "true");
    this.search.setAttribute("aria-activedescendant", made?.id ?? "");
    if (scroll) made?.scrollIntoView({ block: "nearest" });
    this.describe(name);
  }

  /** The marked file, large, beside the list. */
  async describe(name) {
    if (!name) return this.card.replaceChildren();
    const about = await aboutFile(name);
    if (name !== this.marked) return;
    const { file, folder } = partsOf(name);
    const picture = about.preview ? element("img", { alt: "", src: api.apiURL(about.preview) }) : element("span", {}, initial(file));
    const recommended = about.strength == null ? "" : `recommended strength ${strengthText(about.strength)}`;
    const words = element("div", { className: "lw-triggers" }, ...about.triggers.map((word) => element("span", { className: "lw-word" }, word)));
    const facts = [folder, about.error || factsOf(about), recommended].filter(Boolean).map((text) => element("p", {}, text));
    this.card.replaceChildren(element("div", { className: "lw-card-cover" }, picture), element("b", {}, file), ...facts, words);
  }

  take(name) {
    this.close();
    this.chosen(name);
  }

  key(event) {
    const names = [...this.options.keys()];
    const at = names.indexOf(this.marked);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + PAGE, PageUp: at - PAGE }[event.key];
    if (to !== undefined) this.mark(names[Math.max(0, Math.min(names.length - 1, to))]);
    else if (event.key === "Escape") this.close(); // a search field would only clear itself
    else if (event.key === "Enter") this.options.has(this.marked) && !event.repeat && this.take(this.marked);
    else return;
    event.preventDefault();
  }
}

/** The letter that stands where there is no cover, which may be of two halves. */
const initial = (file) => [...file][0]?.toUpperCase() ?? "";

/** [folder, names] in the order of the names, those in no folder first. */
function inFolders(names) {
  const folders = new Map([["", []]]);
  for (const name of names) {
    const { folder } = partsOf(name);
    if (!folders.has(folder)) folders.set(folder, []);
    folders.get(folder).push(name);
  }
  return [...folders];
}
