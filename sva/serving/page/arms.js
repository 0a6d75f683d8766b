// An octopus: one arm for each loaded expert, as long as its weight in the answer.

import { colourOf, draw, short } from "./dom.js";

const ARMS = 8; // at least; an octopus has so many
const WIDTH = 230;
const HEIGHT = 176;
const CENTRE = { x: WIDTH / 2, y: 72 };
const STUB = 34; // length of an arm that does nothing, in units of the picture
const FULL = 80; // and of one with the weight 1, or the largest weight if that is above 1
const NUMBERS = 6; // weights beside the tips at most; there is no room for more
const STEPS = 28; // points along an arm

/**
 * The picture of a mixture.
 *
 * @param {string[]} names of the loaded experts
 * @param {Object<string, number>} weights of those that answer, by name
 * @param {string} sentence that says the same in words
 */
export function octopus(names, weights, sentence) {
  const all = [...names, ...Object.keys(weights).filter((name) => !names.includes(name))];
  const count = Math.max(ARMS, all.length);
  const owner = new Map(all.map((name, place) => [armOf(place, all.length, count), name]));
  const largest = Math.max(1, ...Object.values(weights));
  const isCrowded = Object.keys(weights).length > NUMBERS;
  const grey = draw("g");
  const coloured = draw("g");
  let gaze = { x: 0, y: 0, weight: 0 };
  for (let arm = 0; arm < count; arm++) {
    const name = owner.get(arm);
    const weight = name === undefined ? 0 : (weights[name] ?? 0);
    const line = centreLine(arm, count, weight ? STUB + (FULL - STUB) * (weight / largest) : STUB);
    const group = draw("g", { class: weight ? `arm at-work ${colourOf(name)}` : "arm" });
    if (name !== undefined) group.dataset.expert = name;
    const thick = Math.min(1, (ARMS + 1) / (count + 1));
    group.append(draw("path", { d: outline(line, thick) }));
    if (weight) {
      const tip = line.at(-1);
      group.append(...suckers(line, thick), ...(isCrowded ? [] : [tipText(tip, short(weight))]));
      if (weight > gaze.weight) gaze = { x: tip.x - CENTRE.x, y: tip.y - CENTRE.y, weight };
    }
    (weight ? coloured : grey).append(group);
  }
  const picture = draw("svg", { class: "octopus", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  picture.setAttribute("aria-label", sentence);
  picture.append(grey, coloured, head(gaze));
  return picture;
}

/** The arm of an expert, so that few experts have arms far apart, the same on both sides. */
function armOf(place, experts, arms) {
  const middle = ((place + 0.5) * arms) / experts;
  return place < experts / 2 ? Math.floor(middle) : Math.ceil(middle) - 1;
}

/** Points from the head to the tip, with the direction in each; arms hang down and curl outwards. */
function centreLine(arm, count, length) {
  const across = (arm + 0.5) / count; // 0: far left, 1: far right
  const start = Math.PI * (1.06 - 1.12 * across); // angle, 0 to the right and pi / 2 down
  const side = across < 0.5 ? 1 : -1;
  const curl = (0.55 + 0.75 * Math.abs(across - 0.5)) * side;
  let { x, y } = CENTRE;
  const points = [];
  for (let step = 0; step <= STEPS; step++) {
    const along = step / STEPS;
    const angle = start - side * 0.22 * Math.sin(Math.PI * along) + curl * along * along * along * 1.6;
    points.push({ x, y, angle, along });
    x += ((length + 22) / STEPS) * Math.cos(angle);
    y += ((length + 22) / STEPS) * Math.sin(angle);
  }
  return points;
}

const halfWidth = (along) => 7.6 * (1 - along) ** 0.75 + 1.1;

/** The closed outline of an arm that becomes thinner. */
function outline(line, thick) {
  const edge = (side) =>
    line.map(({ x, y, angle, along }) => {
      const half = side * thick * halfWidth(along);
      return `${(x - half * Math.sin(angle)).toFixed(1)} ${(y + half * Math.cos(angle)).toFixed(1)}`;
    });
  return `M${edge(1).join("L")}L${edge(-1).reverse().join("L")}Z`;
}

function suckers(line, thick) {
  const inner = line.at(-1).x < CENTRE.x ? -1 : 1;
  return line
    .filter(({ along }, step) => along > 0.36 && along < 0.9 && step % 3 === 0)
    .map(({ x, y, angle, along }) => {
      const half = thick * halfWidth(along);
      const off = inner * 0.35 * half;
      const place = { cx: (x - off * Math.sin(angle)).toFixed(1), cy: (y + off * Math.cos(angle)).toFixed(1) };
      return draw("circle", { class: "sucker", ...place, r: (0.34 * half).toFixed(1) });
    });
}

function tipText({ x, y }, text) {
  const side = (x - CENTRE.x) / FULL;
  const anchor = side < -0.3 ? "end" : side > 0.3 ? "start" : "middle";
  const places = { x: (x + 9 * side).toFixed(1), y: (y + (Math.abs(side) > 0.8 ? -5 : 13)).toFixed(1) };
  return draw("text", { ...places, "text-anchor": anchor, text });
}

/** The head over the arms, whose eyes look along the strongest arm. */
function head(gaze) {
  const { x, y } = CENTRE;
  const far = Math.hypot(gaze.x, gaze.y) || 1;
  const pupil = { x: (1.9 * gaze.x) / far, y: (1.9 * gaze.y) / far };
  const eye = (side) => [
    draw("circle", { class: "eye", cx: x + 10 * side, cy: y - 6, r: 5.4 }),
    draw("circle", { class: "pupil", cx: x + 10 * side + pupil.x, cy: y - 6 + pupil.y, r: 2.7 }),
  ];
  const shape =
    `M${x} ${y - 66}C${x - 32} ${y - 66} ${x - 38} ${y - 38} ${x - 31} ${y - 18}` +
    `C${x - 27} ${y - 6} ${x - 29} ${y + 6} ${x - 20} ${y + 13}C${x - 10} ${y + 19} ${x + 10} ${y + 19} ${x + 20} ${y + 13}` +
    `C${x + 29} ${y + 6} ${x + 27} ${y - 6} ${x + 31} ${y - 18}C${x + 38} ${y - 38} ${x + 32} ${y - 66} ${x} ${y - 66}Z`;
  return draw("g", { class: "head" }, draw("path", { d: shape }), ...eye(-1), ...eye(1));
}
