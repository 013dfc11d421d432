// The panel on LoRA Trainer: what the training does, its curve, its previews, and the buttons that steer it.
import { app } from "../../../scripts/app.js";
import { addStyle, element } from "./dom.js";
import { Chart } from "./trainer_chart.js";
import { LiveRun } from "./trainer_live.js";
import { Strip } from "./trainer_strip.js";
import { bytes, count, figures, headline } from "./trainer_words.js";

const COLLAPSED = 26;
const PLOT = 128; // the least height of the curve
const SHOWN_NOTES = 3;
const BUTTONS = [
  ["finish", "Finish now", "Stop after this step, keep the work, and go on with the graph."],
  ["preview", "Preview now", "Draw the preview prompts with the LoRA as it is now, then train on."],
  ["save", "Save now", "Write a LoRA file of the current step, then train on."],
  ["pause", "Pause", "Stop after this step and free the memory, until you continue. The queue waits meanwhile."],
];
const CONTINUE = ["Continue", "Load the model again and train on from where it was."];
const ASKED = {
  finish: "Finishing after this step …",
  preview: "Drawing previews after this step …",
  save: "Saving after this step …",
};

export class Panel {
  constructor(node) {
    addStyle("trainer.css");
    this.node = node;
    this.chart = new Chart();
    this.strip = new Strip();
    this.headline = element("b", { className: "lw-headline" });
    this.figures = element("span", { className: "lw-figures" });
    this.bar = element("div", { className: "lw-bar" });
    this.plan = element("p", {});
    this.planBox = element("details", { className: "lw-plan" }, element("summary", {}, "Settings"), this.plan);
    this.message = element("p", { className: "lw-said", role: "status" });
    this.notes = element("ul", { className: "lw-notes" });
    this.buttons = new Map(BUTTONS.map(([action, text, title]) => [action, this.button(action, text, title)]));
    this.body = element(
      "div",
      { className: "lw-training-body" },
      this.chart.root,
      this.strip.root,
      this.notes,
      this.planBox,
      this.message,
      element("div", { className: "lw-actions", role: "group", "aria-label": "Training" }, ...this.buttons.values()),
    );
    this.root = element(
      "div",
      { className: "lw-training", "aria-label": "Training", role: "region" },
      element("div", { className: "lw-status" }, this.headline, this.figures),
      this.bar,
      this.body,
    );
    this.forwardToCanvas();
    this.heights = new ResizeObserver(() => this.fit());
    for (const part of [...this.root.children, ...this.body.children]) this.heights.observe(part);
    this.live = new LiveRun(node, (state) => this.show(state));
    this.show(null);
  }

  stop() {
    this.live.stop();
    this.heights.disconnect();
  }

  button(action, text, title) {
    const onclick = () => made.getAttribute("aria-disabled") === "true" || this.ask(made.dataset.action);
    const made = element("button", { type: "button", title, onclick }, text);
    made.dataset.action = action;
    return made;
  }

  async ask(action) {
    try {
      await this.live.ask(action);
    } catch (error) {
      this.say(error.message, true);
    }
  }

  // Showing

  /** A state of the training, or null while there is none. */
  show(state) {
    const status = state?.status ?? "idle";
    this.root.dataset.status = status;
    this.body.hidden = this.bar.hidden = status === "idle" || (status === "preparing" && !state.loss.length && !state.plan);
    this.headline.textContent = headline(state ?? { status });
    this.figures.textContent = state ? figures(state) : "";
    this.figures.title = state ? memoryWords(state.memory) : "";
    this.root.title = status === "idle" ? "Curve, previews and buttons appear here when this node trains." : "";
    if (state) this.showRun(state);
    this.fit();
  }

  showRun(state) {
    const [done, all] = state.of ? [state.done, state.of] : [state.step, state.total];
    this.bar.style.setProperty("--lw-done", `${all ? Math.min(100, (100 * done) / all) : 0}%`);
    this.chart.show(state);
    this.strip.show(state);
    this.showNotes(state.notes);
    this.planBox.hidden = !state.plan;
    this.plan.textContent = state.plan;
    const prepares = state.status === "preparing";
    if (prepares !== this.prepares) this.planBox.open = prepares; // else as the user left it
    this.prepares = prepares;
    const asked = state.asked.map((action) => ASKED[action]).join(" ");
    const pausing = state.paused && state.status !== "paused" ? "Pausing after this step …" : "";
    this.say(state.message || asked || pausing, state.status === "failed");
    this.showButtons(state);
  }

  showNotes(notes) {
    const lines = notes.map((note) => element("li", {}, element("b", {}, when(note)), note.text));
    const newest = lines.slice(-SHOWN_NOTES);
    this.notes.replaceChildren(...newest);
    this.notes.title = notes.map((note) => when(note) + note.text).join("\n");
    this.notes.hidden = !notes.length;
  }

  showButtons({ possible, asked, paused }) {
    for (const [action, made] of this.buttons) {
      const goesOn = action === "pause" && paused;
      const [text, title] = goesOn ? CONTINUE : BUTTONS.find(([name]) => name === action).slice(1);
      made.dataset.action = goesOn ? "resume" : action;
      if (made.textContent !== text) made.textContent = text;
      made.title = title;
      const enabled = possible.includes(made.dataset.action) && !asked.includes(action);
      made.setAttribute("aria-disabled", String(!enabled));
    }
  }

  say(text, isError = false) {
    this.message.textContent = text;
    this.message.hidden = !text;
    this.message.classList.toggle("lw-error", isError);
  }

  // Its place on the node

  /** The height the panel needs, the curve at its smallest. */
  get height() {
    if (this.body.hidden) return COLLAPSED;
    const gap = 6;
    const inner = [...this.body.children].filter((part) => !part.hidden);
    const high = (part) => (part === this.chart.root ? PLOT + this.chart.legend.offsetHeight + 2 : part.offsetHeight);
    const body = inner.reduce((sum, part) => sum + high(part) + gap, 0);
    return COLLAPSED + this.bar.offsetHeight + body + 12;
  }

  /** Makes the node high enough, and as much lower when the panel has become lower. */
  fit() {
    const height = this.height;
    if (height === this.fitted || !this.node.graph) return;
    const before = this.fitted;
    this.fitted = height;
    const [width, now] = this.node.size;
    const least = this.node.computeSize()[1];
    const wanted = before > height ? Math.max(least, now - (before - height)) : Math.max(least, now);
    if (Math.abs(wanted - now) > 1) this.node.setSize([width, wanted]);
    this.node.graph.setDirtyCanvas(true, true);
  }

  /** On the classic canvas the wheel and the middle button go on moving the graph over the panel. */
  forwardToCanvas() {
    const classic = () => !window.LiteGraph.vueNodesMode;
    this.root.addEventListener("wheel", (event) => {
      const sideways = this.strip.row.contains(event.target) && (event.shiftKey || event.deltaX);
      if (classic() && !sideways) app.canvas.processMouseWheel(event);
    });
    for (const [kind, act] of [["pointerdown", "processMouseDown"], ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]])
      this.root.addEventListener(kind, (event) => {
        if (classic() && (event.button === 1 || event.buttons & 4)) app.canvas[act](event);
      });
  }
}

/** The step of a note, unless its text begins with it. */
function when({ step, text }) {
  return step == null || /^step /i.test(text) ? "" : `step ${count(step)} `;
}

function memoryWords(memory) {
  if (!memory) return "";
  const { kind, used, peak, free } = memory;
  return `${kind}: ${bytes(used)} used, ${bytes(peak)} at most so far, ${bytes(free)} free`;
}
