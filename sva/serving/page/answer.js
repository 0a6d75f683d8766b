// One answer on the page: its text as it comes, who gave it, how sure the first pass was, and the spectrum behind it.

import { octopus } from "./arms.js";
import { get } from "./api.js";
import { colourOf, make, percent, short } from "./dom.js";
import { chart } from "./spectrum.js";

let weights = null; // the names of all matrices, once they have been asked for
let chosenWeight = ""; // the same in every answer, so that answers can be compared

export class Answer {
  /**
   * @param {string} title who is asked
   * @param {{name: string, label: string, digest: string}[]} experts that are loaded now
   */
  constructor(title, experts) {
    this.text = "";
    this.experts = experts;
    this.words = document.createTextNode("");
    this.title = make("h3", { text: title });
    this.note = make("p", { class: "note", hidden: "" });
    this.about = make("figure", { class: "about", hidden: "" });
    const body = make("div", { class: "text" });
    body.append(this.words);
    const column = make("div", { class: "column" }, body, this.note);
    this.element = make("section", { class: "answer at-work", "aria-label": `Answer of ${title}` });
    this.element.append(this.title, column, this.about);
  }

  /** Takes a chunk of the stream. */
  add(chunk) {
    for (const choice of chunk.choices) {
      if (choice.sva) this.tell(choice.sva);
      const more = choice.delta?.content ?? "";
      this.text += more;
      this.words.appendData(more);
      if (choice.finish_reason === "length") this.say("Cut at the most tokens that were asked for.");
    }
  }

  /** Nothing more comes. */
  end() {
    this.element.classList.remove("at-work");
  }

  /** A sentence below the answer. */
  say(sentence, kind = "note") {
    this.note.textContent = sentence;
    this.note.className = kind;
    this.note.hidden = false;
  }

  /** Shows who answers; the costs come with the last chunk. */
  tell(sva) {
    if (this.about.hidden) {
      this.sentence = sentenceOf(sva);
      const names = this.experts.map((expert) => expert.name);
      this.cost = make("p", { class: "cost" });
      const side = make("figcaption", {}, make("p", { class: "who", text: this.sentence }), ...shares(sva.experts));
      if (sva.probs) side.append(...this.firstPass(sva));
      side.append(this.cost);
      this.about.append(octopus(names, sva.experts, this.sentence), side);
      this.about.hidden = false;
      this.element.append(this.spectrum(sva.experts));
    }
    this.cost.textContent = [cost("first pass", sva.first_pass), cost("answer", sva.second_pass)]
      .filter(Boolean)
      .join("\n");
  }

  /** A bar for each label of the first pass, the likeliest first. */
  firstPass({ probs, label }) {
    const list = make("ul", { class: "bars" });
    for (const [name, prob] of Object.entries(probs).sort((one, other) => other[1] - one[1])) {
      const expert = this.experts.find((each) => each.label === name);
      const bar = make("span", { class: `bar ${expert ? colourOf(expert.name) : ""}` });
      bar.style.setProperty("--share", String(prob));
      const track = make("span", { class: "track" }, bar);
      const kind = name === label ? "chosen" : "";
      const texts = [make("span", { text: name }), track, make("span", { class: "number", text: percent(prob) })];
      list.append(make("li", { class: kind }, ...texts));
    }
    return [make("h4", { text: "First pass" }), list];
  }

  /** The part that opens to the spectrum of a matrix. */
  spectrum(mixture) {
    const select = make("select", { "aria-label": "Matrix" });
    const trouble = make("p", { class: "error", role: "alert", hidden: "" });
    const strongest = Object.entries(mixture).sort((one, other) => other[1] - one[1])[0];
    const view = chart();
    view.element.classList.add("spectrum", ...(strongest ? [colourOf(strongest[0])] : []));
    const details = make("details", {}, make("summary", { text: "Spectrum of one matrix" }), select, trouble, view.element);
    const load = async () => {
      trouble.hidden = true;
      try {
        if (!select.options.length) await fillWeights(select);
        const told = await get(`v1/spectra/${encodeURIComponent(select.value)}?${new URLSearchParams(mixture)}`);
        await this.sameExperts(mixture);
        view.show(told);
      } catch (error) {
        trouble.textContent = error.message;
        trouble.hidden = false;
      }
    };
    const beside = (what) => this.element.parentElement.querySelectorAll(what); // of both answers to one question
    details.addEventListener("toggle", () => {
      for (const each of beside("details")) each.open = details.open;
      if (details.open) load();
    });
    select.addEventListener("change", () => {
      chosenWeight = select.value;
      for (const other of beside("details select")) {
        if (other.value === chosenWeight) continue;
        other.value = chosenWeight;
        other.dispatchEvent(new Event("change"));
      }
      load();
    });
    return details;
  }

  /** Throws where an expert of the mixture was replaced since it answered: its z would be another's. */
  async sameExperts(mixture) {
    const { data } = await get("v1/experts");
    for (const name of Object.keys(mixture)) {
      const then = this.experts.find((expert) => expert.name === name);
      const now = data.find((expert) => expert.name === name);
      if (then && now && then.digest !== now.digest)
        throw new Error(`${name} was replaced after this answer, so the z that answered are gone.`);
    }
  }
}

async function fillWeights(select) {
  weights ??= (await get("v1/spectra")).data.map((each) => each.weight);
  chosenWeight ||= weights[Math.floor(weights.length / 2)];
  for (const name of weights) {
    const option = make("option", { value: name, text: name.replace(/\.weight$/, "") });
    option.selected = name === chosenWeight;
    select.append(option);
  }
}

function sentenceOf({ experts, label }) {
  const names = Object.keys(experts);
  if (!names.length) return label === undefined ? "The base answers." : "The first pass leaves it to the base.";
  if (names.length > 1) return `A mixture of ${names.length} experts answers.`;
  return label === undefined ? `${names[0]} answers.` : `The first pass chose ${names[0]}.`;
}

/** The weight of each expert that answers. */
function shares(experts) {
  const list = make("ul", { class: "shares" });
  const all = Object.entries(experts);
  for (const [name, weight] of all) {
    const swatch = make("span", { class: `swatch ${colourOf(name)}` });
    list.append(make("li", {}, swatch, make("span", { text: name }), make("span", { class: "number", text: short(weight) })));
  }
  return all.length ? [make("h4", { text: "Weights" }), list] : [];
}

function cost(what, pass) {
  if (!pass) return "";
  const tokens = pass.drawn ? `, ${pass.drawn} token${pass.drawn === 1 ? "" : "s"}` : "";
  return `${what} ${pass.seconds.toFixed(2)} s${tokens}`;
}
