// Stacks under names, as small JSON files among ComfyUI's user data.
import { api } from "../../../scripts/api.js";
import { button, element, enable, fill, write } from "./dom.js";
import { icon } from "./stack_icons.js";
import { rowsOf, textOf } from "./stack_values.js";
import { inWindow } from "./stack_window.js";

const FOLDER = "lora_workbench/stacks";
const ENDING = ".json";
const NO_NAME = /[\\/:*?"<>|\u0000-\u001f]|^\.|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)/i; // what is no file name on every system
const LONGEST = 80;

export class Presets {
  /** `loaded` is called with the rows of the preset that is loaded. */
  constructor(loaded) {
    this.loaded = loaded;
    this.name = element("input", { type: "text", className: "lw-find", placeholder: "Name of this stack", "aria-label": "Name of this stack", maxLength: LONGEST, spellcheck: false });
    this.save = button("Save", "Save the rows of this node under this name.", () => this.store());
    this.list = element("div", { className: "lw-presets-list", role: "list", "aria-label": "Presets" });
    this.said = element("p", { className: "lw-said", role: "status" });
    const line = element("form", { className: "lw-find-line", onsubmit: (event) => event.preventDefault() }, this.name, this.save);
    this.root = element("dialog", { className: "lw-window lw-presets", "aria-label": "Presets" }, element("b", {}, "Presets"), line, this.list, this.said);
    this.name.addEventListener("input", () => this.show());
    this.name.addEventListener("keydown", (event) => event.key === "Enter" && this.save.click());
    inWindow(this.root);
  }

  /** Shows the presets there are; these rows are what "Save" saves. */
  async open(rows) {
    this.rows = rows;
    this.deleting = undefined;
    this.names = [];
    document.body.append(this.root);
    this.root.showModal();
    this.say("");
    this.show();
    this.name.focus();
    await this.attempt(() => this.refresh());
  }

  close() {
    if (this.root.open) this.root.close();
  }

  async refresh() {
    const files = await api.listUserDataFullInfo(FOLDER);
    const names = files.map(({ path }) => path).filter((path) => path.endsWith(ENDING) && !path.includes("/"));
    this.names = names.map((path) => path.slice(0, -ENDING.length)).sort((one, other) => one.localeCompare(other));
    this.show();
  }

  show() {
    const taken = this.names.includes(this.typed);
    write(this.save, taken ? "Replace" : "Save");
    enable(this.save, Boolean(this.typed) && this.rows.length > 0);
    fill(this.list, this.names.map((name) => this.line(name)));
    if (!this.names.length) this.list.replaceChildren(element("p", {}, "None yet. A preset keeps the rows: files, strengths, switches and blocks."));
  }

  get typed() {
    return this.name.value.trim();
  }

  line(name) {
    const load = button(name, "Put these rows in place of those of the node.", () => this.load(name), "lw-preset");
    const sure = this.deleting === name;
    const remove = button(sure ? "Delete?" : "", "Delete this preset.", () => this.delete(name), sure ? "lw-danger" : "lw-sign");
    if (!sure) remove.append(icon("remove"));
    remove.setAttribute("aria-label", sure ? `Really delete ${name}` : `Delete ${name}`);
    return element("div", { className: "lw-preset-line", role: "listitem" }, load, remove);
  }

  // Doing

  store() {
    const { typed, rows } = this;
    if (NO_NAME.test(typed)) return this.say(`'${typed}' cannot be the name of a file on every system: choose another one, without \\ / : * ? " < > | or points at its ends.`, true);
    return this.attempt(async () => {
      await api.storeUserData(pathOf(typed), textOf(rows), { overwrite: true, stringify: false, throwOnError: true, full_info: false });
      this.name.value = "";
      await this.refresh();
      this.say(`Saved as ${typed}.`);
    });
  }

  load(name) {
    return this.attempt(async () => {
      const response = await api.getUserData(pathOf(name));
      const rows = response.ok ? rowsOf(await response.text()) : null;
      if (!rows) throw new Error(`The preset '${name}' cannot be read: save it again, or delete it.`);
      this.close();
      this.loaded(rows);
    });
  }

  /** The first push asks, the second deletes. */
  delete(name) {
    if (this.deleting !== name) {
      this.deleting = name;
      this.show();
      return this.list.querySelector(".lw-danger").focus();
    }
    return this.attempt(async () => {
      const response = await api.deleteUserData(pathOf(name));
      if (!response.ok && response.status !== 404) throw new Error(`The preset '${name}' cannot be deleted: ComfyUI answers with status ${response.status}.`);
      this.deleting = undefined;
      await this.refresh();
      this.say(`Deleted ${name}.`);
    });
  }

  async attempt(work) {
    try {
      await work();
    } catch (error) {
      this.say(error.message, true);
    }
  }

  say(text, isError = false) {
    write(this.said, text);
    this.said.hidden = !text;
    this.said.classList.toggle("lw-error", isError);
  }
}

const pathOf = (name) => `${FOLDER}/${name}${ENDING}`;
