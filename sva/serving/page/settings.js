// Who answers, and how: the controls beside the chat, made of what the server has loaded.

import { byId, colourOf, make } from "./dom.js";

const MIXTURE = "mixture"; // no value of an expert's radio button, which starts with "expert:"

export class Settings {
  constructor() {
    this.base = "base";
    this.experts = [];
    this.shown = "";
    byId("who").addEventListener("change", () => this.open());
    byId("choice").addEventListener("change", () => this.open());
  }

  /** Shows what there is to ask; keeps what was chosen where it is still there. */
  update(models, experts) {
    this.base = models.find((model) => model.owned_by === "base").id;
    this.experts = experts;
    const hasLabels = models.some((model) => model.owned_by === "two passes");
    const shown = JSON.stringify([this.base, hasLabels, experts.map(({ name, label, description }) => [name, label, description])]);
    if (shown === this.shown) return;
    const before = this.shown && this.who;
    const weights = this.mixture;
    this.shown = shown;
    const rows = [row("base", "base", "the model as it is")];
    for (const expert of experts) rows.push(row(`expert:${expert.name}`, expert.name, told(expert), colourOf(expert.name)));
    if (experts.length) rows.push(row(MIXTURE, "mixture", "experts by weight"));
    if (hasLabels) rows.push(row("adaptive", "adaptive", "a first pass chooses"));
    byId("who").replaceChildren(...rows);
    byId("mixture").replaceChildren(...experts.map((expert) => slider(expert.name, weights[expert.name] ?? 0.5)));
    const wanted = before || (hasLabels ? "adaptive" : "base");
    const inputs = [...byId("who").querySelectorAll("input")];
    (inputs.find((input) => input.value === wanted) ?? inputs[0]).checked = true;
    this.open();
  }

  /** Shows the controls of what is chosen. */
  open() {
    byId("mixture").hidden = this.who !== MIXTURE;
    byId("adaptive").hidden = this.who !== "adaptive";
    byId("threshold-row").hidden = byId("choice").value !== "threshold";
  }

  get who() {
    return byId("who").querySelector("input:checked")?.value ?? "base";
  }

  get mixture() {
    const fields = [...byId("mixture").querySelectorAll("input[type=number]")];
    return Object.fromEntries(fields.map((field) => [field.dataset.expert, Number(field.value)]));
  }

  /** What is asked, one or two of {title, body}; the second is the base beside the first. */
  get asked() {
    const common = { temperature: Number(byId("temperature").value), max_tokens: Number(byId("max-tokens").value) };
    const base = { title: this.base, body: { model: this.base, ...common } };
    const main = this.main(common) ?? base;
    return byId("compare").checked && main !== base ? [main, base] : [main];
  }

  main(common) {
    const { who } = this;
    if (who === MIXTURE) return { title: "mixture", body: { model: this.base, mixture: this.mixture, ...common } };
    if (who === "adaptive") {
      const choice = byId("choice").value;
      const adaptive = { choice: choice === "threshold" ? Number(byId("threshold").value) : choice };
      return { title: "adaptive", body: { model: "adaptive", adaptive, ...common } };
    }
    if (who === "base") return null;
    const name = who.slice("expert:".length);
    return { title: name, body: { model: name, ...common } };
  }
}

const told = ({ label, description }) => [label, description].filter(Boolean).join(": ");

function row(value, name, about, colour = "") {
  const input = make("input", { type: "radio", name: "who", value });
  const words = make("span", {}, make("b", { text: name }), make("small", { text: about }));
  return make("label", { class: "choice" }, input, make("span", { class: `swatch ${colour}` }), words);
}

/** The weight of an expert twice: a slider up to 1, and a number for more. */
function slider(name, weight) {
  const range = make("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": `${name}, slider` });
  const number = make("input", { type: "number", min: 0, max: 100, step: "any", "aria-label": name });
  number.dataset.expert = name;
  range.value = number.value = String(weight);
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value));
  const swatch = make("span", { class: `swatch ${colourOf(name)}` });
  return make("div", { class: "slider" }, make("span", {}, swatch, make("span", { text: name })), range, number);
}
