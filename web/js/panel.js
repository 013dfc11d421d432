// What the panels on our nodes have in common: a line with a headline and figures, a bar, a body, and their place.
import { app } from "../../../scripts/app.js";
import { addStyle, element, write } from "./dom.js";

const COLLAPSED = 26;
const GAP = 6;
const WIDGET = "lora_workbench_panel";
// What ComfyUI shows by itself on a node that works: the panel has the same line of text, and the same pictures.
const SHOWN_TWICE = ["$$node-text-preview", "$$canvas-image-preview"];

/** Subclasses fill the body, and say which part may be lower than it is (`leastOf`). */
export class Panel {
  constructor(node, className, said) {
    addStyle("panel.css");
    this.node = node;
    this.headline = element("b", { className: "lw-headline" });
    this.figures = element("span", { className: "lw-figures" });
    this.bar = element("div", { className: "lw-bar" });
    this.message = element("p", { className: "lw-said", role: "status" });
    this.body = element("div", { className: "lw-panel-body" });
    this.root = element(
      "div",
      { className: `lw-panel ${className}`, "aria-label": said, role: "region" },
      element("div", { className: "lw-status" }, this.headline, this.figures),
      this.bar,
      this.body,
    );
    this.forwardToCanvas();
  }

  fill(...parts) {
    this.body.append(...parts);
    this.heights = new ResizeObserver(() => this.fit());
    for (const part of [...this.root.children, ...this.body.children]) this.heights.observe(part);
  }

  stop() {
    this.heights.disconnect();
  }

  /** The node has the values of a saved graph, or those of a copied node. */
  configured() {}

  /** The node was run, or answered from what ComfyUI has cached; `output` is what it shows. */
  executed(output) {}

  say(text, isError = false) {
    write(this.message, text);
    this.message.hidden = !text;
    this.message.classList.toggle("lw-error", isError);
  }

  /** How much of the bar is full. */
  showDone(done, all) {
    this.bar.style.setProperty("--lw-done", `${all ? Math.min(100, (100 * done) / all) : 0}%`);
  }

  /** The height a part of the body needs at least. */
  leastOf(part) {
    return part.offsetHeight;
  }

  /** Whether a turn of the wheel is for the panel and not for the graph. */
  scrolls() {
    return false;
  }

  /** The height the panel needs, its flexible parts at their smallest. */
  get height() {
    if (this.body.hidden) return COLLAPSED;
    const inner = [...this.body.children].filter((part) => !part.hidden);
    const body = inner.reduce((sum, part) => sum + this.leastOf(part) + GAP, 0);
    return COLLAPSED + this.bar.offsetHeight + body + 2 * GAP;
  }

  /** Makes the node high enough, and as much lower when the panel has become lower. */
  fit() {
    const height = this.height;
    if (height === this.fitted || !this.node.graph) return;
    const before = this.fitted;
    this.fitted = height;
    // Nodes 2.0 shares what a node has between its text fields and the panel, whatever the panel needs.
    this.root.style.minHeight = window.LiteGraph.vueNodesMode ? `${height}px` : "";
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
      if (classic() && !this.scrolls(event)) app.canvas.processMouseWheel(event);
    });
    for (const [kind, act] of [["pointerdown", "processMouseDown"], ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]])
      this.root.addEventListener(kind, (event) => {
        if (classic() && (event.button === 1 || event.buttons & 4)) app.canvas[act](event);
      });
  }
}

/** A panel that shows work on the server as it goes on: subclasses have `live`, a LiveState. */
export class LivePanel extends Panel {
  stop() {
    super.stop();
    this.live.stop();
  }

  /** The node's id and name are known once the saved graph is read. */
  configured() {
    setTimeout(() => this.live.refreshSoon());
  }

  /** What ComfyUI has cached sends no events of ours. */
  executed() {
    this.live.refreshSoon();
  }
}

/** Puts a panel below the widgets of its node, in place of what ComfyUI shows there. */
export function addPanel(node, panel) {
  // After the widgets of the schema, as saved values are read by position.
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => panel.height };
  const widget = node.addDOMWidget(WIDGET, "panel", panel.root, options);
  widget.serialize = false; // keeps it out of the saved widget values as well
  node.hideOutputImages = true;
  hideWidgets(node, SHOWN_TWICE);
  after(node, "onRemoved", () => panel.stop());
  after(node, "onConfigure", () => {
    panel.configured();
    setTimeout(() => takePlace(panel));
  });
  after(node, "onExecuted", (output) => panel.executed(output));
}

/** Undo makes a node anew, but Nodes 2.0 goes on showing the panel of the node that was there: this one replaces it. */
function takePlace({ node, root }) {
  if (!window.LiteGraph.vueNodesMode || root.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${node.id}"] .lw-panel`)?.replaceWith(root);
}

/** Keeps widgets of these names, which are added later, out of sight. */
function hideWidgets(node, names) {
  const add = node.addCustomWidget;
  node.addCustomWidget = function (widget) {
    if (names.includes(widget.name)) setHidden(widget, true);
    return add.call(this, widget);
  };
}

/** Takes a widget out of sight, or brings it back; its value is saved and queued all the same. */
export function setHidden(widget, hidden) {
  widget.hidden = (widget.options ??= {}).hidden = hidden;
}

/** Does something more when the node's `name` is called, with what it is called with. */
function after(node, name, act) {
  const before = node[name];
  node[name] = function (...values) {
    const answer = before?.apply(this, values);
    act(...values);
    return answer;
  };
}
