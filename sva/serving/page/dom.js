// Elements in one line each. Text is always set as text: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element with attributes (`text` is its text) and children. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** A new SVG element, likewise. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, { text, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

/** A probability or share as a reader says it: 47 %. */
export const percent = (share) => `${Math.round(100 * share)} %`;

/** A number with the digits that a weight needs: 1, 0.35, 0.005. */
export const short = (number) => String(Number(number.toPrecision(3)));

/** Colours of experts, kept for as long as the page is open, whoever comes and goes. */
const colours = new Map();
const COLOURS = 8;

/** The class that colours everything of an expert. */
export function colourOf(name) {
  if (!colours.has(name)) colours.set(name, colours.size % COLOURS);
  return `expert-${colours.get(name)}`;
}
