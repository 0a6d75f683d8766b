// Requests to the server that this page came from, with the token where it needs one.

const KEPT = "sva-token";
let token = read();

function read() {
  try {
    return sessionStorage.getItem(KEPT) ?? "";
  } catch {
    return ""; // no storage in this browser: the token lives as long as the page
  }
}

/** Uses a token from now on; it is kept until the tab is closed. */
export function setToken(value) {
  token = value;
  try {
    if (value) sessionStorage.setItem(KEPT, value);
    else sessionStorage.removeItem(KEPT);
  } catch {
    // as above
  }
}

/** An answer that is an error: its sentence, and the status of HTTP (0: there was no answer). */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function send(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it running?", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(told?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

/** The JSON at a path. */
export const get = async (path) => (await send(path, {})).json();

/** The chunks of a streamed chat answer, one after another. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message, 200);
    yield chunk;
  }
  throw new Refused("The server broke off in the middle of its answer.", 0);
}

/** The data of each server-sent event; the server sends one line of data an event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The connection to the server was lost.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
