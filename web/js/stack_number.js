// A strength that is typed, stepped with the arrow keys, or dragged sideways.
import { element } from "./dom.js";
import { strengthText } from "./stack_words.js";

const [STEP, FINE, MOST] = [0.05, 0.01, 100];
const DRAGGED = 3; // pixels after which a press is no click any more
const PIXELS = 5; // for one step

export class Strength {
  /** `changed` is called with the number that was set, null for the recommended one. */
  constructor(said, changed) {
    this.changed = changed;
    this.root = element("input", { type: "text", inputMode: "decimal", className: "lw-strength", "aria-label": said });
    this.root.title = `${said}: type, press the arrow keys, or drag sideways. Emptied, it is the recommended strength.`;
    this.root.addEventListener("change", () => this.typed());
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("pointerdown", (event) => this.grab(event));
    this.root.addEventListener("mousedown", (event) => document.activeElement === this.root || event.preventDefault());
  }

  /** A number or null, and the strength that null stands for. */
  show(number, recommended) {
    this.number = number;
    this.recommended = recommended;
    const text = number == null ? "" : strengthText(number);
    if (this.root.value !== text && document.activeElement !== this.root) this.root.value = text;
    this.root.placeholder = strengthText(recommended);
  }

  typed() {
    const text = this.root.value.trim().replace(",", ".");
    const number = text === "" ? null : Number(text);
    this.set(Number.isNaN(number) ? this.number : number);
  }

  set(number) {
    const within = number == null ? null : Math.max(-MOST, Math.min(MOST, number));
    this.root.value = within == null ? "" : strengthText(within);
    if (within !== this.number) this.changed((this.number = within));
  }

  key(event) {
    const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (by) {
      event.preventDefault();
      this.typed();
      this.set(this.stepped(by, event.shiftKey ? FINE : STEP));
    }
    if (event.key === "Enter") this.typed();
    if (event.key === "Escape") this.root.value = this.number == null ? "" : strengthText(this.number);
    if (["Enter", "Escape"].includes(event.key)) this.root.blur();
  }

  stepped(steps, size) {
    const from = this.number ?? this.recommended;
    return Number((Math.round(from / size + steps) * size).toFixed(3));
  }

  /** A press drags the strength; one that does not move goes into the field. */
  grab(event) {
    if (event.button || document.activeElement === this.root) return;
    const [start, from] = [event.clientX, this.number ?? this.recommended];
    const stopping = new AbortController();
    const options = { signal: stopping.signal };
    let wanted;
    this.root.setPointerCapture(event.pointerId);
    const move = ({ clientX }) => {
      if (wanted === undefined && Math.abs(clientX - start) < DRAGGED) return;
      wanted = Number((from + Math.round((clientX - start) / PIXELS) * STEP).toFixed(3));
      this.root.value = strengthText(wanted);
    };
    const end = () => {
      stopping.abort();
      if (wanted !== undefined) return this.set(wanted);
      this.root.focus();
      this.root.select();
    };
    this.root.addEventListener("pointermove", move, options);
    this.root.addEventListener("pointerup", end, options);
    this.root.addEventListener("pointercancel", () => stopping.abort() || this.show(this.number, this.recommended), options);
  }
}
