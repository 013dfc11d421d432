// The panel on LoRA Trainer: what the training does, its curve, its previews, and the buttons that steer it.
import { addStyle, button, element, enable, write } from "./dom.js";
import { LivePanel } from "./panel.js";
import { Chart } from "./trainer_chart.js";
import { LiveRun } from "./trainer_live.js";
import { Strip } from "./trainer_strip.js";
import { figures, headline } from "./trainer_words.js";
import { bytes, count } from "./words.js";

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

export class TrainerPanel extends LivePanel {
  constructor(node) {
    super(node, "lw-training", "Training");
    addStyle("trainer.css");
    this.chart = new Chart();
    this.strip = new Strip();
    this.plan = element("p", {});
    this.planBox = element("details", { className: "lw-plan" }, element("summary", {}, "Settings"), this.plan);
    this.notes = element("ul", { className: "lw-notes" });
    this.buttons = new Map(BUTTONS.map(([action, text, title]) => [action, this.button(action, text, title)]));
    this.fill(
      this.chart.root,
      this.strip.root,
      this.notes,
      this.planBox,
      this.message,
      element("div", { className: "lw-actions", role: "group", "aria-label": "Training" }, ...this.buttons.values()),
    );
    this.live = new LiveRun(node, (state) => this.show(state));
    this.show(null);
  }

  button(action, text, title) {
    const made = button(text, title, () => this.ask(made.dataset.action));
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
    this.showDone(done, all);
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
      write(made, text);
      made.title = title;
      enable(made, possible.includes(made.dataset.action) && !asked.includes(action));
    }
  }

  // Its place on the node

  leastOf(part) {
    return part === this.chart.root ? PLOT + this.chart.legend.offsetHeight + 2 : super.leastOf(part);
  }

  /** Sideways, over the film strip. */
  scrolls(event) {
    return this.strip.row.contains(event.target) && (event.shiftKey || event.deltaX);
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
