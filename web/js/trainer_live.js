// What the server knows about the training on a node, kept up to date by its events.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const ADDRESS = "/lora_workbench/training";
const EVENT = "lora_workbench.training";
const LISTS = ["loss", "smoothed", "validation", "rate", "previews", "notes"];
const RUNNING = ["preparing", "training", "paused"];
const SILENCE = 4000; // ms after which a running training is asked: ComfyUI can lose a page that was reloaded

export class LiveRun {
  /** `changed` is called with every new state. */
  constructor(node, changed) {
    this.node = node;
    this.changed = changed;
    this.state = null;
    this.stopping = new AbortController();
    const options = { signal: this.stopping.signal };
    api.addEventListener(EVENT, ({ detail }) => this.receive(detail), options);
    api.addEventListener("reconnected", () => this.refreshSoon(), options);
    this.watching = setInterval(() => {
      const silent = performance.now() - (this.heard ?? 0) > SILENCE;
      if (silent && RUNNING.includes(this.state?.status)) this.refreshSoon();
    }, SILENCE);
  }

  stop() {
    this.stopping.abort();
    clearInterval(this.watching);
  }

  /** The name of the LoRA, where it is typed on the node itself. */
  get name() {
    if (this.node.inputs?.some((input) => input.widget?.name === "name" && input.link != null)) return undefined;
    return this.node.widgets?.find((widget) => widget.name === "name")?.value;
  }

  /** Asks for the whole state; of a node that is in the graph several times, of the place that was trained last. */
  async refresh() {
    const query = this.name === undefined ? "" : `?${new URLSearchParams({ name: this.name })}`;
    const asked = executionIds(this.node).map((id) => request(`${ADDRESS}/${encodeURIComponent(id)}${query}`));
    const states = (await Promise.all(asked)).sort((one, other) => weight(other) - weight(one));
    if (states.length && weight(states[0]) >= 0) this.accept(states[0]);
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

  /** One question at a time, however many events arrive meanwhile. */
  refreshSoon() {
    this.refreshing ??= this.refresh()
      .catch(() => {}) // the next event asks again
      .finally(() => {
        this.refreshing = undefined;
        const { id, number } = this.newest ?? {};
        if (id && id === this.state?.id && number > this.state.number) this.refreshSoon(); // it came meanwhile
      });
  }

  isMine(event) {
    return executionIds(this.node).includes(event.node_id) && [undefined, event.name].includes(this.name);
  }

  accept(state) {
    this.state = state;
    this.changed(state);
  }

  /** Asks the training to do something; throws the server's sentence when it cannot. */
  async ask(action) {
    const id = this.state?.node_id ?? executionIds(this.node)[0];
    await request(`${ADDRESS}/${encodeURIComponent(id)}/${action}`, { method: "POST" });
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

/** Running trainings before ended ones, later ones before earlier ones, and -1 for none at all. */
function weight({ id, status }) {
  if (status === "idle") return -1;
  return parseInt(id, 16) * (RUNNING.includes(status) ? 2 : 1);
}

/** The ids under which the server runs a node: "7", or "2:7" inside the subgraph node 2. */
export function executionIds(node) {
  const found = [];
  const search = (graph, prefix) => {
    if (graph === node.graph) found.push(`${prefix}${node.id}`);
    for (const other of graph?.nodes ?? []) if (other.subgraph) search(other.subgraph, `${prefix}${other.id}:`);
  };
  search(app.rootGraph ?? app.graph, "");
  return found;
}

async function request(path, options = {}) {
  let response;
  try {
    response = await api.fetchApi(path, options);
  } catch {
    throw new Error("ComfyUI does not answer. Nothing is lost: start it again and queue again.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `ComfyUI answers with status ${response.status}.`);
  return answer;
}
