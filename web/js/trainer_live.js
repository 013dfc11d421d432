// What the server knows about the training on a node. Its events bring only what is new.
import { LiveState } from "./live.js";

const LISTS = ["loss", "smoothed", "validation", "rate", "previews", "notes"];
const SOURCE = {
  address: "/lora_workbench/training",
  event: "lora_workbench.training",
  running: ["preparing", "training", "paused"],
};

export class LiveRun extends LiveState {
  constructor(node, changed) {
    super(node, changed, SOURCE);
  }

  /** The name of the LoRA, where it is typed on the node itself. */
  get name() {
    if (this.node.inputs?.some((input) => input.widget?.name === "name" && input.link != null)) return undefined;
    return this.node.widgets?.find((widget) => widget.name === "name")?.value;
  }

  get query() {
    return this.name === undefined ? "" : `?${new URLSearchParams({ name: this.name })}`;
  }

  /** An event: what is new since the one before. */
  receive(event) {
    const known = this.state;
    this.newest = event;
    this.heard = performance.now();
    if (known?.id === event.id) {
      const follows = event.number === known.number + 1;
      const fits = LISTS.every((key) => !event[key] || event[key].from <= known[key].length);
      if (follows && fits) this.accept(joined(known, event));
      else if (event.number > known.number) this.refreshSoon();
    } else if (this.isMine(event)) {
      this.refreshSoon();
    }
  }

  isMine(event) {
    return super.isMine(event) && [undefined, event.name].includes(this.name);
  }
}

function joined(state, event) {
  const next = { ...state, ...event };
  for (const key of LISTS) {
    const { from, values } = event[key] ?? { from: state[key].length, values: [] };
    next[key] = [...state[key].slice(0, from), ...values];
  }
  return next;
}
