// What the server knows about the work of a node, kept up to date by its events.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const SILENCE = 4000; // ms after which running work is asked: ComfyUI can lose a page that was reloaded

export class LiveState {
  /** `changed` is called with every new state; `address` and `event` are where the server tells it. */
  constructor(node, changed, { address, event, running }) {
    this.node = node;
    this.changed = changed;
    this.address = address;
    this.running = running;
    this.state = null;
    this.stopping = new AbortController();
    const options = { signal: this.stopping.signal };
    api.addEventListener(event, ({ detail }) => this.receive(detail), options);
    api.addEventListener("reconnected", () => this.refreshSoon(), options);
    this.watching = setInterval(() => {
      const silent = performance.now() - (this.heard ?? 0) > SILENCE;
      if (silent && running.includes(this.state?.status)) this.refreshSoon();
    }, SILENCE);
  }

  stop() {
    this.stopping.abort();
    clearInterval(this.watching);
  }

  /** What is added to the question for the whole state. */
  get query() {
    return "";
  }

  /** Asks for the whole state; of a node that is in the graph several times, of the place that ran last. */
  async refresh() {
    const asked = executionIds(this.node).map((id) => request(`${this.address}/${encodeURIComponent(id)}${this.query}`));
    const states = (await Promise.all(asked)).sort((one, other) => this.weight(other) - this.weight(one));
    if (states.length && this.weight(states[0]) >= 0) this.accept(states[0]);
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

  /** An event, which is a whole state. */
  receive(event) {
    if (!this.isMine(event)) return;
    this.newest = event;
    this.heard = performance.now();
    if (event.id !== this.state?.id || event.number > this.state.number) this.accept(event);
  }

  isMine(event) {
    return executionIds(this.node).includes(event.node_id);
  }

  accept(state) {
    this.state = state;
    this.changed(state);
  }

  /** Running work before ended work, later before earlier, and -1 for none at all. */
  weight({ id, status }) {
    if (status === "idle") return -1;
    return parseInt(id, 16) * (this.running.includes(status) ? 2 : 1);
  }

  /** Asks the work to do something and gives the answer; throws the server's sentence when it cannot. */
  async ask(action, body) {
    const id = this.state?.node_id ?? executionIds(this.node)[0];
    const sent = body && { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    return request(`${this.address}/${encodeURIComponent(id)}/${action}`, { method: "POST", ...sent });
  }
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
