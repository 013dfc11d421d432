// A picture, large, among others: arrow keys go along its row and to other rows.
import { api } from "../../../scripts/api.js";
import { addStyle, element, enable, write } from "./dom.js";

export class Viewer {
  /** `said` names the dialog; `along` is what the left and right keys go along, as "step". */
  constructor(said, along) {
    addStyle("viewer.css");
    this.image = element("img", { alt: "" });
    this.title = element("b", {});
    this.caption = element("span", {});
    this.action = element("button", { type: "button", className: "lw-viewer-action", onclick: () => this.act() });
    const step = (text, label, by) =>
      element("button", { type: "button", title: label, "aria-label": label, onclick: () => this.move(by, 0) }, text);
    const close = element("button", { type: "button", title: "Close (Escape)", "aria-label": "Close", onclick: () => this.root.close() }, "×");
    this.root = element(
      "dialog",
      { className: "lw-viewer", "aria-label": said },
      element("div", { className: "lw-viewer-picture" }, this.image),
      element(
        "div",
        { className: "lw-viewer-line", "aria-live": "polite" },
        step("‹", `Earlier ${along} (left arrow)`, -1),
        step("›", `Later ${along} (right arrow)`, 1),
        this.title,
        this.caption,
        this.action,
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

  /**
   * Shows one of `pictures`, each {url, row, at, title, caption}, `at` being its place in its row.
   * `action` gives what can be done with a picture, {text, act, enabled}, or null.
   */
  open(pictures, picture, action = () => null) {
    this.pictures = pictures;
    this.actionOn = action;
    const opens = !this.root.open;
    if (opens) document.body.append(this.root);
    this.show(picture);
    if (opens) this.root.showModal();
    if (!this.action.hidden) this.action.focus();
  }

  show(picture) {
    this.picture = picture;
    const action = this.actionOn(picture);
    this.image.src = api.apiURL(picture.url);
    this.image.alt = picture.caption || picture.title;
    write(this.title, picture.title);
    write(this.caption, picture.caption);
    this.action.hidden = !action;
    write(this.action, action?.text ?? "");
    enable(this.action, action?.enabled ?? true);
  }

  act() {
    const action = this.actionOn(this.picture);
    if (action && action.enabled !== false) action.act();
  }

  close() {
    if (this.root.open) this.root.close();
  }

  /** So many places further, and so many rows; stays where it is at the ends. */
  move(places, rows) {
    const names = [...new Set(this.pictures.map(({ row }) => row))];
    const name = names[names.indexOf(this.picture.row) + rows];
    const row = this.pictures.filter((picture) => picture.row === name);
    if (!row.length) return;
    const here = rows ? row.findIndex(({ at }) => at >= this.picture.at) : row.indexOf(this.picture);
    this.show(row.at(here < 0 ? -1 : Math.max(0, Math.min(here + places, row.length - 1))));
  }

  key(event) {
    // A key held down since before the dialog opened must not push its button.
    if (event.repeat && ["Enter", " "].includes(event.key)) event.preventDefault();
    const [places, rows] =
      { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    const far = { Home: -Infinity, End: Infinity }[event.key];
    if (places === undefined && far === undefined) return;
    event.preventDefault();
    this.move(far ?? places, rows ?? 0);
  }
}
