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
