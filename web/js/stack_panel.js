// The panel on LoRA Stack Apply: rows that grow, presets, and what the last run found out about the stack.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addStyle, button, element, enable, fill, write } from "./dom.js";
import { executionIds } from "./live.js";
import { Panel, setHidden } from "./panel.js";
import { Chooser } from "./stack_chooser.js";
import { namesOf } from "./stack_files.js";
import { Presets } from "./stack_presets.js";
import { Row } from "./stack_row.js";
import { newRow, rowsOf, takeOldRows, textOf } from "./stack_values.js";
import { headline, strengthText } from "./stack_words.js";
import { XRay } from "./stack_xray.js";

const MOST = 2; // of strength in all, as guides advise
const WATCHED = 500; // ms between two looks at values that others may have set
const RESULT = "lora_workbench_stack";
const UNREADABLE = "The rows of this node cannot be read: add LoRAs to start again, or undo.";

export class StackPanel extends Panel {
  /** `stopped` is called when the node is gone. */
  constructor(node, stopped) {
    super(node, "lw-stack", "LoRAs");
    addStyle("stack.css");
    this.stopped = stopped;
    this.list = element("div", { className: "lw-rows", role: "list", "aria-label": "LoRAs" });
    this.xray = new XRay(() => this.fit());
    this.add = button("Add LoRA", "Choose a LoRA to put at the end of the stack.", () => this.choose());
    this.presetButton = button("Presets", "Save this stack under a name, or load one.", () => this.presets.open(this.rows));
    this.all = button("", "", () => this.switchAll());
    const actions = element("div", { className: "lw-actions", role: "group", "aria-label": "Stack" }, this.add, this.presetButton, this.all);
    this.fill(this.list, this.message, actions, this.xray.root);
    this.chooser = new Chooser();
    this.presets = new Presets((rows) => this.replace(rows));
    this.bar.hidden = true;
    this.views = [];
    setHidden(this.widget, true);
    this.read();
    this.watching = setInterval(() => this.look(), WATCHED);
    this.stopping = new AbortController();
    api.addEventListener("executing", ({ detail }) => this.runs(detail), { signal: this.stopping.signal });
  }

  stop() {
    super.stop();
    clearInterval(this.watching);
    this.stopping.abort();
    this.chooser.close();
    this.presets.close();
    this.stopped();
  }

  // Values, which live in the node's widget

  get widget() {
    return this.node.widgets.find(({ name }) => name === "rows");
  }

  get rows() {
    return this.views.map(({ row }) => row);
  }

  /** Others set the node's values, and ComfyUI refuses to queue it, without telling. */
  look() {
    this.read();
    const refused = refusalOf(this.node);
    if (refused === this.refused) return;
    this.refused = refused;
    this.render();
  }

  /** Takes over what the widget holds, whoever has set it: a saved graph, undo, a copied node. */
  read() {
    const before = takeOldRows(this.node);
    const { value } = this.widget;
    if (value === this.text && !before.length) return;
    const rows = rowsOf(value);
    this.unreadable = !rows;
    this.views = [...before, ...(rows ?? [])].map((row, at) => this.viewOf(row, at));
    if (before.length) this.write();
    this.text = this.widget.value;
    this.render();
    if (before.length) this.node.setSize([this.node.size[0], this.node.computeSize()[1]]);
  }

  /** The view of a row at its place, the one there was when it shows the same file. */
  viewOf(row, at) {
    const view = this.views[at];
    if (view?.row.lora !== row.lora) return new Row(row, this.acts);
    view.take(row);
    return view;
  }

  write() {
    this.unreadable = false;
    this.text = textOf(this.rows);
    this.widget.value = this.text;
    this.widget.callback?.(this.text);
  }

  /** Keeps what the user has changed, as one step that can be undone. */
  changed() {
    this.answered = this.refused;
    this.write();
    this.render();
    const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
    if (tracker?.captureCanvasState) tracker.captureCanvasState();
    else tracker?.checkState?.(); // what older versions call it
  }

  configured() {
    this.answered = refusalOf(this.node); // which was about a node of this id before
    this.read();
    this.executed(outputOf(this.node));
  }

  executed(output) {
    const [table] = output?.[RESULT] ?? [];
    this.ran = false;
    if (table) this.xray.show(table);
    this.fit();
  }

  /** A node begins to run: when this one did before and has told nothing, there is no x-ray of the last run. */
  runs(id) {
    const mine = id != null && executionIds(this.node).includes(String(id));
    if (this.ran && !mine) this.xray.show({});
    this.ran = mine;
  }

  // Showing

  render() {
    for (const view of this.views) view.show();
    fill(this.list, this.views.map(({ root }) => root));
    this.list.hidden = !this.views.length;
    this.describe();
  }

  /** Once for all rows of which something new is known: each change of the node's height costs Nodes 2.0 much. */
  describeSoon() {
    this.describing ??= requestAnimationFrame(() => {
      this.describing = undefined;
      this.describe();
    });
  }

  /** What is said about all rows. */
  describe() {
    const on = this.views.filter(({ row }) => row.on);
    const total = on.reduce((sum, { strength }) => sum + Math.abs(strength), 0);
    const unusable = on.some((view) => view.unusable); // which its row says
    const refused = this.refused && this.refused !== this.answered && !unusable;
    this.say(this.unreadable ? UNREADABLE : refused ? textOfRefusal(this.refused) : "", true);
    const wrong = this.unreadable || refused || unusable;
    this.root.dataset.status = wrong ? "failed" : total > MOST ? "paused" : on.length ? "finished" : "idle";
    write(this.headline, headline(this.rows));
    write(this.figures, on.length ? `strength ${strengthText(total)} in all` : "");
    this.figures.classList.toggle("lw-much", total > MOST);
    this.figures.title = total > MOST ? `More than ${MOST} in all often spoils pictures: lower some strengths.` : "";
    write(this.all, this.allOn ? "All off" : "All on");
    this.all.title = this.allOn ? "Switch every LoRA off." : "Switch every LoRA on.";
    enable(this.all, this.views.length > 0);
    this.fit();
  }

  // Changing

  get acts() {
    return {
      changed: () => this.changed(),
      described: () => this.describeSoon(),
      remove: (view) => this.remove(view),
      choose: (view) => this.choose(view),
      grab: (view, event) => this.grab(view, event),
      move: (view, by) => this.move(view, by),
    };
  }

  get allOn() {
    return this.views.length > 0 && this.views.every(({ row }) => row.on);
  }

  switchAll() {
    const on = !this.allOn;
    for (const { row } of this.views) row.on = on;
    this.changed();
  }

  /** Puts another file into a row, or adds a row. */
  choose(view) {
    this.chooser.open(namesOf(this.node), view?.row.lora, (lora) => {
      if (view) view.row.lora = lora;
      else this.views.push(new Row(newRow(lora), this.acts));
      this.changed();
    });
  }

  remove(view) {
    const at = this.views.indexOf(view);
    this.views.splice(at, 1);
    this.changed();
    (this.views[at] ?? this.views[at - 1])?.remove.focus();
  }

  replace(rows) {
    this.views = rows.map((row) => new Row(row, this.acts));
    this.changed();
  }

  // The order. The row that is moved stays in the page, and its neighbours go round it: else it would lose the pointer.

  move(view, by) {
    if (this.shift(view, by)) this.changed();
  }

  shift(view, by) {
    const at = this.views.indexOf(view);
    const other = this.views[at + by];
    if (!other) return false;
    [this.views[at], this.views[at + by]] = [other, view];
    if (by < 0) view.root.after(other.root);
    else view.root.before(other.root);
    return true;
  }

  grab(view, event) {
    if (event.button) return;
    const stopping = new AbortController();
    const options = { signal: stopping.signal };
    const order = [...this.views];
    view.handle.setPointerCapture(event.pointerId);
    view.root.classList.add("lw-dragged");
    const end = (kept) => {
      stopping.abort();
      view.root.classList.remove("lw-dragged");
      if (!kept) this.views = order;
      if (this.views.some((one, at) => one !== order[at])) this.changed();
      else this.render();
    };
    view.handle.addEventListener("pointermove", ({ clientY }) => this.follow(view, clientY), options);
    view.handle.addEventListener("pointerup", () => end(true), options);
    view.handle.addEventListener("pointercancel", () => end(false), options);
  }

  /** Brings a row to where the pointer is. */
  follow(view, y) {
    const middle = ({ root }) => root.getBoundingClientRect().top + root.getBoundingClientRect().height / 2;
    for (const by of [-1, 1]) {
      let other;
      while ((other = this.views[this.views.indexOf(view) + by]) && (middle(other) - y) * by < 0) this.shift(view, by);
    }
  }
}

/** What a node has shown in its last run, as far as the page still knows: undo and other tabs make nodes anew. */
function outputOf(node) {
  const { graph } = node;
  const id = !graph || graph === (app.rootGraph ?? app.graph) ? String(node.id) : `${graph.id}:${node.id}`;
  return app.nodeOutputs?.[id];
}

/** Why ComfyUI did not queue the node when it last was to, which its page tells once for each widget, behind two clicks. */
function refusalOf(node) {
  const found = executionIds(node).flatMap((id) => app.lastNodeErrors?.[id]?.errors ?? []);
  return found.find(({ type }) => type === "custom_validation_failed");
}

/** The sentence alone: ComfyUI puts the name of a widget before it. */
const textOfRefusal = ({ details }) => details.replace(/^\w+ - /, "");
