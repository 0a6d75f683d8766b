// The chat: a question goes to one or two models at once, and their answers stream into the page.

import { Answer } from "./answer.js";
import { octopus } from "./arms.js";
import { chat, get, setToken } from "./api.js";
import { byId, make } from "./dom.js";
import { Settings } from "./settings.js";

const settings = new Settings();
let turns = []; // {question, main, beside} of this chat, all texts; `beside` is the base's where it was asked
let running = null; // the AbortController of the answers that stream

/** Asks the server what it has; shows the sentence of what goes wrong. */
async function refresh() {
  try {
    const [models, experts] = await Promise.all([get("v1/models"), get("v1/experts")]);
    settings.update(models.data, experts.data);
    byId("model").textContent = settings.base;
    byId("trouble").hidden = true;
    welcome();
    return true;
  } catch (error) {
    const needsToken = error.status === 401;
    if (needsToken) byId("token-row").hidden = false;
    if (needsToken && !byId("token").value) openSettings(true);
    byId("trouble").textContent = error.message;
    byId("trouble").hidden = false;
    return false;
  }
}

/** Before the first question: the arms that there are. */
function welcome() {
  const place = byId("welcome");
  place.hidden = turns.length > 0;
  const { experts } = settings;
  const weights = Object.fromEntries(experts.map((expert) => [expert.name, 1]));
  const count = experts.length === 1 ? "1 expert is" : `${experts.length || "No"} experts are`;
  const names = experts.map((expert) => expert.name);
  const sentence = `${count} loaded${names.length ? `: ${names.join(", ")}` : ""}.`;
  const more = "An expert scales the singular values of the model's matrices, and that is all it changes.";
  place.replaceChildren(octopus(names, weights, sentence), make("p", { text: sentence }), make("p", { text: more }));
}

/** The messages of a column so far: its own answers, and the other's where it was not asked. */
function messages(question, isBeside) {
  const found = [];
  for (const turn of turns) {
    const text = (isBeside ? turn.beside : null) ?? turn.main;
    if (text) found.push({ role: "user", content: turn.question }, { role: "assistant", content: text });
  }
  return [...found, { role: "user", content: question }];
}

async function ask(question) {
  running = new AbortController();
  answering(true);
  await refresh();
  const asked = settings.asked;
  const answers = asked.map(({ title }) => new Answer(title, settings.experts));
  const columns = make("div", { class: asked.length > 1 ? "answers two" : "answers" }, ...answers.map((x) => x.element));
  const turn = make("article", { class: "turn" }, make("h2", { text: question }), columns);
  byId("turns").append(turn);
  byId("welcome").hidden = true;
  turn.scrollIntoView({ block: "start" });
  const chatTurns = turns; // a new chat may begin meanwhile
  const history = asked.map((_, place) => messages(question, place === 1));
  await Promise.all(asked.map(({ body }, place) => stream(answers[place], { ...body, messages: history[place] })));
  chatTurns.push({ question, main: answers[0].text, beside: answers[1]?.text ?? null });
  byId("said").textContent = answers.map((x) => `${x.title.textContent}: ${x.text} ${x.note.textContent}`).join(". ");
  running = null;
  answering(false);
}

async function stream(answer, body) {
  try {
    for await (const chunk of chat(body, running.signal)) {
      const isAtEnd = innerHeight + scrollY >= document.body.scrollHeight - 60;
      answer.add(chunk);
      if (isAtEnd) scrollTo(0, document.body.scrollHeight);
    }
  } catch (error) {
    if (error.name === "AbortError") answer.say("Stopped.");
    else answer.say(error.message, "error");
  }
  answer.end();
}

function answering(isAnswering) {
  byId("send").hidden = isAnswering;
  byId("stop").hidden = !isAnswering;
  if (isAnswering) byId("said").textContent = "The answer is coming.";
}

function stop() {
  if (!running) return;
  running.abort();
  byId("question").focus();
}

function openSettings(isOpen) {
  byId("settings").classList.toggle("open", isOpen);
  byId("show-settings").setAttribute("aria-expanded", String(isOpen));
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || running) return;
  byId("question").value = "";
  openSettings(false);
  ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
addEventListener("keydown", (event) => event.key === "Escape" && stop());
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", () => {
  stop();
  turns = [];
  byId("turns").replaceChildren();
  welcome();
  byId("question").focus();
});
byId("show-settings").addEventListener("click", () => openSettings(!byId("settings").classList.contains("open")));
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("token").addEventListener("change", async (event) => {
  setToken(event.target.value.trim());
  if (await refresh()) byId("question").focus();
});
addEventListener("focus", refresh);
refresh();
