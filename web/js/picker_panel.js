// The panel on LoRA Checkpoint Picker: the verdict, its curve, the grid of pictures, and what the user can choose.
import { app } from "../../../scripts/app.js";
import { addStyle, button, element, enable, fill, write } from "./dom.js";
import { LiveState } from "./live.js";
import { LivePanel } from "./panel.js";
import { Chart } from "./picker_chart.js";
import { Grid } from "./picker_grid.js";
import { blindTable, keyOf, picturesOf, plainTable, votable } from "./picker_table.js";
import { Vote, resultWords } from "./picker_vote.js";
import { brokenWords, counted, fileLine, headline, size, timeLeft } from "./picker_words.js";
import { Viewer } from "./viewer.js";

const PLOT = 104; // the least height of the curve
const MOST_GRID = 440; // of the grid's height that the node makes room for by itself
const SOURCE = {
  address: "/lora_workbench/picker",
  event: "lora_workbench.picking",
  running: ["measuring", "drawing", "asking"],
};
const TITLES = {
  use: "Hand this file on; the queue goes on with it.",
  blind: "Vote for pictures under letters, without knowing which file made them; the files are told afterwards.",
  reveal: "Tell which file made which picture, with the votes given so far.",
  leave: "Show the files by name again, without a vote.",
  keep: "Copy this file into the loras folder itself, under the name of the training, with a picture as its cover.",
  delete: "Delete the other files of this training. It says first which, and how large they are.",
  spare: "Delete nothing.",
  again: "Ask once more the next time the graph is queued.",
};

export class PickerPanel extends LivePanel {
  constructor(node) {
    super(node, "lw-picking", "Checkpoints");
    addStyle("picker.css");
    this.verdict = element("div", { className: "lw-verdict" }, element("b", {}), element("span", { className: "lw-confidence" }), element("p", {}));
    this.chart = new Chart((file) => this.select(file.lora));
    this.grid = new Grid((key) => this.enlarge(key));
    this.broken = element("p", { className: "lw-broken" });
    this.choice = element("select", { "aria-label": "Checkpoint", onchange: () => this.select(this.choice.value) });
    this.buttons = Object.fromEntries(Object.entries(TITLES).map(([name, title]) => [name, this.button(name, title)]));
    this.actions = element("div", { className: "lw-actions", role: "group", "aria-label": "Checkpoints" }, this.choice, ...Object.values(this.buttons));
    this.fill(this.verdict, this.chart.root, this.grid.root, this.broken, this.message, this.actions);
    this.viewer = new Viewer("Picture", "checkpoint");
    this.live = new LiveState(node, (state) => this.show(state), SOURCE);
    this.ticking = setInterval(() => this.tick(), 1000);
    this.show(null);
  }

  stop() {
    super.stop();
    clearInterval(this.ticking);
    this.viewer.close();
  }

  button(name, title) {
    const made = button("", title, () => this.push(name));
    made.addEventListener("keydown", (event) => event.repeat && event.key === "Enter" && event.preventDefault());
    made.addEventListener("click", (event) => event.detail > 1 && event.stopImmediatePropagation(), { capture: true });
    made.dataset.action = name;
    return made;
  }

  // Showing

  /** A state of the picking, or null while there is none. */
  show(state) {
    const before = this.state;
    this.state = state;
    this.heard = performance.now();
    if (state?.id !== before?.id || state?.status !== before?.status) this.begin(before);
    this.render();
  }

  /** Another picking, or another part of it: what was chosen, voted and said before is over. */
  begin(before) {
    if (this.state?.id !== before?.id) this.selected = undefined;
    if (this.state?.status === "picked") this.selected = undefined;
    this.vote = this.told = this.waiting = this.deleting = undefined;
    this.viewer.close();
    if (this.state?.status === "asking") this.callUser();
  }

  callUser() {
    const detail = "Which checkpoint do you want? The queue waits for your choice.";
    app.extensionManager.toast.add({ severity: "info", summary: this.node.title, detail, life: 6000 });
  }

  render() {
    const { state } = this;
    const status = state?.status ?? "idle";
    this.root.dataset.status = status;
    this.root.title = status === "idle" ? "The verdict, its curve and the pictures appear here when this node runs." : "";
    write(this.headline, this.headlineText(state ?? { status }));
    this.tick();
    this.bar.hidden = !["measuring", "drawing"].includes(status);
    this.body.hidden = status === "idle" || !(state.files.length || state.cells.length || state.message);
    if (!this.body.hidden) this.showPicking(state);
    this.fit();
  }

  headlineText(state) {
    if (!this.blind) return headline(state);
    return `Blind vote · ${this.vote.votes.size} of ${counted(this.vote.rows.length, "prompt")}`;
  }

  /** What changes by itself: the time that is left, and the colour of the node, which labels lie on. */
  tick() {
    this.showTime();
    const ground = window.LiteGraph.vueNodesMode ? "" : (this.node.bgcolor ?? window.LiteGraph.NODE_DEFAULT_BGCOLOR);
    if (ground === this.ground) return;
    this.ground = ground;
    this.root.style.setProperty("--lw-ground", ground);
  }

  showTime() {
    const { status, seconds_left: seconds, files } = this.state ?? {};
    const gone = (performance.now() - this.heard) / 1000;
    const text = status === "asking" && seconds != null ? timeLeft(seconds - gone, files) : "";
    if (text !== this.figures.title) this.figures.title = text;
    write(this.figures, text);
  }

  showPicking(state) {
    this.showDone(state.done, state.of);
    this.showVerdict(this.blind ? null : state.verdict);
    this.chart.show(state.files, this.chosen);
    this.chart.root.hidden ||= this.blind;
    this.grid.root.hidden = !state.cells.length;
    this.grid.show(this.table);
    write(this.broken, this.blind ? "" : brokenWords(state.files));
    this.broken.hidden = !this.broken.textContent;
    this.say(this.told?.text || this.question || state.message, this.told?.isError ?? state.status === "failed");
    this.showActions();
  }

  showVerdict(verdict) {
    this.verdict.hidden = !verdict;
    if (!verdict) return;
    const [kind, confidence, reason] = this.verdict.children;
    write(kind, verdict.kind[0].toUpperCase() + verdict.kind.slice(1));
    write(confidence, `${verdict.confidence} confidence`);
    confidence.dataset.confidence = verdict.confidence;
    write(reason, verdict.reason);
  }

  get table() {
    return this.blind ? blindTable(this.state, this.vote) : plainTable(this.state, this.chosen, this.vote);
  }

  /** Whether the pictures are under letters now. */
  get blind() {
    return Boolean(this.vote && !this.vote.revealed);
  }

  /** What the panel says by itself: how the vote went, or what is about to be deleted. */
  get question() {
    if (this.deleting) {
      const named = this.others.map(({ label }) => label).join(" · ");
      return `This deletes ${named} (${size(this.others)}) for good and keeps ${this.picked.label}. Push again to delete.`;
    }
    if (this.blind) return "Click a picture to see it large, and vote for the one you like best in every row.";
    return this.vote ? resultWords(this.vote.result(this.state.files), this.vote.rows.length) : "";
  }

  // Choosing

  get usable() {
    return this.state.files.filter(({ broken }) => !broken);
  }

  get picked() {
    return this.state.files.find(({ lora }) => lora === this.state.picked);
  }

  /** The files that the user can delete: of one training, neither picked nor kept. */
  get others() {
    if (this.state.deletable === false) return [];
    return this.state.files.filter(({ lora, kept }) => lora !== this.state.picked && !kept);
  }

  /** The file that is marked: by the user, else the picked one, else the suggested one. */
  get chosen() {
    const { picked } = this.state;
    return this.selected ?? picked ?? this.usable.find(({ suggested }) => suggested)?.lora ?? this.usable.at(-1)?.lora;
  }

  select(lora) {
    this.selected = lora;
    this.render();
  }

  showActions() {
    const { state, blind, buttons, picked } = this;
    const asking = state.status === "asking";
    const done = state.status === "picked" && picked;
    this.showChoice(asking && !blind);
    this.showButton(buttons.use, asking && !blind, `Use ${this.fileNamed(this.chosen)?.label ?? ""}`, Boolean(this.chosen) && !this.waiting);
    this.showButton(buttons.blind, asking && !blind && votable(state).length > 1, this.vote ? "Vote again" : "Blind vote", !this.waiting);
    this.showButton(buttons.reveal, asking && blind, "Reveal", blind && this.vote.votes.size > 0);
    this.showButton(buttons.leave, asking && blind, "Leave the vote");
    this.showButton(buttons.keep, done, picked?.kept ? "Kept" : "Keep", !picked?.kept && !this.waiting);
    const files = `Delete ${counted(this.others.length, "file")}, ${size(this.others)}`;
    this.showButton(buttons.delete, done && this.others.length > 0, this.deleting ? files : "Delete the others", !this.waiting);
    buttons.delete.classList.toggle("lw-danger", Boolean(this.deleting));
    this.showButton(buttons.spare, done && this.deleting, "Delete nothing");
    this.showButton(buttons.again, done && this.asksMe && !this.deleting, "Ask again", !this.waiting);
    this.actions.hidden = [...this.actions.children].every((part) => part.hidden);
  }

  showButton(made, shown, text, enabled = true) {
    made.hidden = !shown;
    write(made, text);
    enable(made, enabled);
  }

  /** Every file that works as a line of a list, also those that are not in the grid. */
  showChoice(shown) {
    this.choice.hidden = !shown;
    if (!shown) return;
    const lines = this.usable.map((file) => [file.lora, fileLine(file, this.state.picked)]);
    const text = JSON.stringify(lines);
    if (text !== this.lines) fill(this.choice, lines.map(([value, line]) => element("option", { value }, line)));
    this.lines = text;
    if (this.choice.value !== this.chosen) this.choice.value = this.chosen;
  }

  /** Whether the node is set to ask, as far as it says so itself. */
  get asksMe() {
    return this.node.widgets.find(({ name }) => name === "pick")?.value === "ask me";
  }

  fileNamed(lora) {
    return this.state.files.find((file) => file.lora === lora);
  }

  // Doing

  push(name) {
    this.told = undefined;
    if (name !== "delete") this.deleting = undefined;
    const act = {
      use: () => this.use(this.chosen),
      blind: () => (this.vote = new Vote(votable(this.state))),
      reveal: () => this.reveal(),
      leave: () => (this.vote = undefined),
      keep: () => this.keep(),
      delete: () => (this.deleting ? this.delete() : (this.deleting = true)),
      spare: () => {}, // that is what every other button does
      again: () => this.again(),
    }[name];
    act();
    this.render();
  }

  /** The picture large, with what can be done with it. */
  enlarge(key) {
    const pictures = picturesOf(this.table);
    this.viewer.open(pictures, pictures.find((picture) => picture.key === key), (picture) => this.actionOn(picture));
  }

  actionOn({ key, title }) {
    const cell = this.state.cells.find((cell) => keyOf(cell) === key);
    const file = this.fileNamed(cell?.lora);
    if (this.state.status !== "asking" || !file || file.broken) return null;
    if (this.blind) return { text: `Vote for ${title}`, act: () => this.give(key) };
    const act = () => this.viewer.close() || this.use(file.lora);
    return { text: `Use ${file.label}`, act, enabled: !this.waiting };
  }

  /** A vote, then the next prompt without one; after the last the files are told. */
  give(key) {
    this.vote.give(this.vote.rows.flat().find((cell) => keyOf(cell) === key));
    if (this.vote.complete) this.reveal();
    else this.enlarge(keyOf(this.vote.open));
    this.render();
  }

  reveal() {
    this.viewer.close();
    this.vote.revealed = true;
    const result = this.vote.result(this.state.files);
    const most = result.filter(([, number]) => number === result[0][1]).map(([file]) => file);
    this.selected = (most.find(({ suggested }) => suggested) ?? most[0]).lora;
  }

  use(lora) {
    this.selected = lora;
    return this.ask("choose", { lora });
  }

  async keep() {
    const answer = await this.ask("keep", { lora: this.state.picked });
    if (answer) this.tell(`Kept as ${answer.kept} in the loras folder.`);
  }

  async delete() {
    this.deleting = undefined;
    const [loras, bytes] = [this.others.map(({ lora }) => lora), this.others.reduce((sum, file) => sum + file.bytes, 0)];
    const words = `${counted(loras.length, "file")}, ${size(this.others)}`;
    if (await this.ask("delete", { loras, bytes })) this.tell(`Deleted ${words}.`);
  }

  async again() {
    if (await this.ask("again")) this.tell("Queue again, and you are asked once more.");
  }

  /** The server's answer, undefined when it refuses; meanwhile nothing else can be asked. */
  async ask(action, body) {
    this.waiting = true;
    this.render();
    try {
      return await this.live.ask(action, body && { ...body, id: this.state.id });
    } catch (error) {
      this.told = { text: error.message, isError: true };
    } finally {
      this.waiting = undefined;
      this.render();
      this.live.refreshSoon();
    }
  }

  tell(text) {
    this.told = { text };
    this.render();
  }

  // Its place on the node

  leastOf(part) {
    if (part === this.chart.root) return PLOT + this.chart.legend.offsetHeight + 2;
    if (part === this.grid.root) return Math.min(this.grid.table.offsetHeight + 4, MOST_GRID);
    return super.leastOf(part);
  }

  /** Over pictures that do not all fit. */
  scrolls({ target, ctrlKey }) {
    const { root } = this.grid;
    return !ctrlKey && root.contains(target) && (root.scrollHeight > root.clientHeight + 4 || root.scrollWidth > root.clientWidth + 4);
  }
}
