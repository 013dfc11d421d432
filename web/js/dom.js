// Elements of the page and style sheets, for every part of the pack that shows something.

/** An element with properties, data-… and aria-… attributes and listeners (`onclick`), and its children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A button; one that is switched off by `enable` keeps the focus, which the browser would take from it otherwise. */
export function button(text, title, does, className = "") {
  const onclick = (event) => made.getAttribute("aria-disabled") === "true" || does(event);
  const made = element("button", { type: "button", className, title, onclick }, text);
  return made;
}

export function enable(made, enabled) {
  const disabled = String(!enabled);
  if (made.getAttribute("aria-disabled") !== disabled) made.setAttribute("aria-disabled", disabled);
}

/** Changes a text only where it is another one: the page does nothing for what stays. */
export function write(made, text) {
  if (made.textContent !== text) made.textContent = text;
}

/** Makes these the children, in this order, and leaves those alone that are in their place already. */
export function fill(parent, children) {
  for (const child of [...parent.children]) if (!children.includes(child)) child.remove();
  children.forEach((child, at) => parent.children[at] === child || parent.insertBefore(child, parent.children[at] ?? null));
}

/** A part of a drawing: svg, path, line, circle, text. */
export function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Loads a style sheet that lies beside this file, once. */
export function addStyle(file) {
  const address = new URL(file, import.meta.url).href;
  if (document.querySelector(`link[href="${address}"]`)) return;
  document.head.append(element("link", { rel: "stylesheet", href: address }));
}
