// The singular values of one matrix, s and s z on logarithmic axes, and the z that answered below them.

import { draw, make } from "./dom.js";

const LEFT = 44;
const RIGHT = 12;
const TOP = 12;
const S_HEIGHT = 150;
const GAP = 20;
const Z_HEIGHT = 96;
const BOTTOM = 42;
const HEIGHT = TOP + S_HEIGHT + GAP + Z_HEIGHT + BOTTOM;
const JOINED = 64; // z that are joined by a line; beyond, there is no room for it
const DECADES = 4; // of s that are drawn at most, below the largest

/** {element, show(told)}: a chart as wide as its place, with a reading of one component by pointer or arrow keys. */
export function chart() {
  const picture = draw("svg", { class: "chart", tabindex: 0, role: "img", height: HEIGHT });
  const reading = make("output", { class: "reading" });
  const element = make("div", {}, picture, reading);
  let told = null;
  let at = 0;
  const paint = () => {
    if (told && element.clientWidth) drawInto(picture, told, element.clientWidth, at);
    if (told) reading.textContent = readingOf(told, at);
  };
  const move = (place) => {
    at = Math.min(told.s.length - 1, Math.max(0, place));
    paint();
  };
  new ResizeObserver(paint).observe(element);
  picture.addEventListener("pointermove", (event) => {
    const share = (event.offsetX - LEFT) / (element.clientWidth - LEFT - RIGHT);
    if (told) move(Math.round(told.s.length ** share) - 1);
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity }[event.key];
    if (!told || step === undefined) return;
    event.preventDefault();
    move(at + step);
  });
  return {
    element,
    show(next) {
      told = next;
      at = Math.min(at, told.s.length - 1);
      picture.setAttribute("aria-label", summary(told));
      paint();
    },
  };
}

function summary({ weight, s, z }) {
  const low = Math.min(...z).toFixed(3);
  const high = Math.max(...z).toFixed(3);
  return `${weight}: ${s.length} singular values from ${s[0].toPrecision(3)} to ${s.at(-1).toPrecision(3)}; z from ${low} to ${high}`;
}

function readingOf({ s, z }, at) {
  const numbers = `s ${s[at].toPrecision(4)}   z ${z[at].toFixed(4)}   s z ${(s[at] * z[at]).toPrecision(4)}`;
  return `${at + 1} of ${s.length}:   ${numbers}`;
}

function drawInto(picture, { s, z }, width, at) {
  const x = logScale(1, s.length, LEFT, width - RIGHT);
  const scaled = s.map((value, place) => value * z[place]);
  const top = Math.max(s[0], ...scaled) * 1.25;
  const least = Math.max(Math.min(...s, ...scaled.filter((value) => value > 0)), top / 10 ** DECADES);
  const y = logScale(least * 0.75, top, TOP + S_HEIGHT, TOP);
  const reach = (Math.max(...z.map((value) => Math.abs(value - 1))) || 0.05) * 1.12;
  const low = TOP + S_HEIGHT + GAP;
  const yz = (value) => low + Z_HEIGHT / 2 - ((value - 1) / reach) * (Z_HEIGHT / 2);

  picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  picture.setAttribute("width", width);
  const floor = TOP + S_HEIGHT;
  const inside = (value) => value >= least * 0.75;
  const line = s.map((value, place) => [x(place + 1), inside(value) ? y(value) : floor]);
  const dots = (values, place, start) =>
    values.flatMap((value, index) => (index >= start && place(value) !== null ? [[x(index + 1), place(value)]] : []));
  const onS = (value) => (inside(value) ? y(value) : null);
  const first = z.slice(0, JOINED).map((value, place) => [x(place + 1), yz(value)]);
  picture.replaceChildren(
    ...axes({ x, y, yz, width, low, reach, rank: s.length, range: [least * 0.75, top] }),
    draw("path", { class: "area", d: `${path(line)}L${x(s.length)} ${floor}L${LEFT} ${floor}Z` }),
    draw("path", { class: "s", d: path(line) }),
    draw("path", { class: "dots", d: points(dots(scaled.slice(0, JOINED), onS, 0)) }),
    draw("path", { class: "dots small", d: points(dots(scaled, onS, JOINED)) }),
    draw("path", { class: "joined", d: path(first) }),
    draw("path", { class: "dots z", d: points(first) }),
    draw("path", { class: "dots small z", d: points(dots(z, yz, JOINED)) }),
    draw("line", { class: "marker", x1: x(at + 1), x2: x(at + 1), y1: TOP, y2: low + Z_HEIGHT }),
    ...legend(width),
  );
}

/** A function from low..high to from..to, by logarithm. */
function logScale(low, high, from, to) {
  const factor = (to - from) / (Math.log(high / low) || 1);
  return (value) => from + factor * Math.log(value / low);
}

const path = (places) => `M${places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
const points = (places) => places.map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}h0`).join("");

/** 1, 2, 5, 10, ... between two numbers; only powers of ten where that would be many. */
function ticks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of [1, 2, 5]) found.push(Number((digit * 10 ** power).toPrecision(1)));
  const within = found.filter((tick) => tick >= low && tick <= high);
  const tens = within.filter((tick) => Number.isInteger(Math.round(Math.log10(tick) * 1e6) / 1e6));
  return within.length > 8 ? tens : within;
}

function axes({ x, y, yz, width, low, reach, rank, range }) {
  const right = width - RIGHT;
  const parts = [];
  const level = (place, text, kind = "grid") => {
    parts.push(draw("line", { class: kind, x1: LEFT, x2: right, y1: place, y2: place }));
    parts.push(draw("text", { x: LEFT - 7, y: place + 4, "text-anchor": "end", text }));
  };
  for (const tick of ticks(...range)) level(y(tick), String(tick));
  const far = Number((reach * 0.75).toPrecision(1));
  for (const off of [far, -far]) level(yz(1 + off), String(Number((1 + off).toPrecision(6))));
  level(yz(1), "1", "one");
  const foot = low + Z_HEIGHT;
  for (const tick of ticks(1, rank)) {
    if (tick !== 1 && x(rank) - x(tick) < 8 + 7 * String(rank).length + 4 * String(tick).length) continue; // no room
    parts.push(draw("text", { x: x(tick), y: foot + 16, "text-anchor": "middle", text: String(tick) }));
  }
  parts.push(draw("text", { x: right, y: foot + 16, "text-anchor": "end", text: String(rank) }));
  const under = { x: (LEFT + right) / 2, y: foot + 35, "text-anchor": "middle" };
  parts.push(draw("text", { ...under, text: "singular value, the largest first" }));
  parts.push(draw("text", { class: "name", x: 4, y: TOP + 4, text: "s" }));
  parts.push(draw("text", { class: "name", x: 4, y: low - 3, text: "z" }));
  return parts;
}

function legend(width) {
  const right = width - RIGHT - 4;
  return [
    draw("path", { class: "s", d: `M${right - 96} ${TOP + 6}h16` }),
    draw("text", { x: right - 75, y: TOP + 10, text: "s" }),
    draw("path", { class: "dots", d: `M${right - 42} ${TOP + 6}h0` }),
    draw("text", { x: right - 33, y: TOP + 10, text: "s z" }),
  ];
}
