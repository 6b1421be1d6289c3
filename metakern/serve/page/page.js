// The page of `metakern serve`: a chat with the user's model, and what it was taught.
// Texts of users and models reach the document through textContent only.

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const POLL = 300; // milliseconds between two looks at an adaptation

const user = { name: localStorage.getItem("metakern.name") ?? "me", token: localStorage.getItem("metakern.token") ?? "" };
let model = ""; // the name of the run's model
let talk = []; // the conversation: messages with role and content
let reply = null; // the AbortController of the reply that is under way
let looks = 0; // counts the looks at what was taught; only the last one is shown

// The document

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function complain(id, message = "") {
  $(id).textContent = message;
  $(id).hidden = !message;
}

function announce(text) {
  $("announcer").textContent = text;
}

function show(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.ariaPressed = String(button.dataset.show === view);
  }
}

// The server

async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (user.token) headers.Authorization = `Bearer ${user.token}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) }).catch(unreachable);
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401 || response.status === 403) identify(error?.message);
  throw new Error(error?.message ?? `The server answered with status ${response.status}.`);
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it running?");
}

const mine = (path) => `v1/users/${encodeURIComponent(user.name)}/${path}`;

async function json(path, options) {
  return (await request(path, options)).json();
}

// Yields the texts that a reply is made of.
async function* completion(name, messages, signal) {
  const body = { model: name, messages, user: user.name, stream: true };
  for (const id of SAMPLING) {
    if ($(id).value !== "") body[id] = Number($(id).value);
  }
  const response = await request("v1/chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0]?.delta.content ?? "";
    }
  }
}

// Who the user is

function identify(problem = "") {
  $("name").value = user.name;
  $("token").value = user.token;
  complain("unknown", problem);
  if (!$("who").open) $("who").showModal();
}

async function enter() {
  abandon();
  $("user").textContent = user.name;
  $("user").ariaLabel = `You are ${user.name}. Change`;
  complain("error");
  complain("refused");
  talk = JSON.parse(sessionStorage.getItem(`metakern.talk.${user.name}`) ?? "[]");
  $("log").replaceChildren();
  talk.forEach(({ role, content }, i) => {
    if (role === "user") return say(content);
    const [item, [place]] = answering([""]);
    fill(place, content);
    offer(item, talk[i - 1].content);
  });
  scroll(true);
  try {
    await connect();
    await refresh();
  } catch (error) {
    complain("error", error.message);
  }
}

async function connect() {
  model = (await json("v1/models")).data[0].id;
  $("model").textContent = document.title = model;
}

// The chat

// Scrolls to the end, unless the user reads farther up.
function scroll(always = false) {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  if (always || scrollHeight - scrollTop - clientHeight < 100) $("scroll").scrollTop = scrollHeight;
}

function say(text) {
  $("log").append(element("li", { className: "said" }, element("p", { textContent: text })));
}

// Adds a reply with one or two places for its texts, and returns the item and the places.
function answering(titles) {
  const places = titles.map(() => element("p"));
  const answers = element("div", { className: "answers" });
  titles.forEach((title, i) => {
    answers.append(element("div", {}, ...(title ? [element("h3", { textContent: title })] : []), places[i]));
  });
  const item = element("li", { className: "reply" }, answers);
  $("log").append(item);
  return [item, places];
}

function fill(place, text) {
  place.textContent = text || "(no words)";
  place.classList.toggle("empty", !text);
}

// Adds what can be done with a reply to what was said.
function offer(item, said) {
  const button = element("button", { type: "button", className: "plain", textContent: "Teach a better answer" });
  button.addEventListener("click", () => {
    show("teach");
    $("say").value = said;
    $("answer").focus();
  });
  item.append(button);
}

async function send(text) {
  if (reply) return;
  const endings = $("compare").checked ? ["-base", ""] : [""]; // of the names of the models
  const controller = (reply = new AbortController());
  const asked = { role: "user", content: text };
  const messages = [...($("whole").checked ? talk : []), asked].filter(({ content }) => content.trim());
  complain("error");
  say(text);
  const [item, places] = answering(endings.length > 1 ? ["Before teaching", "After teaching"] : [""]);
  item.ariaBusy = "true";
  replying(true);
  scroll(true);
  const texts = endings.map(() => "");
  async function write(ending, i) {
    for await (const piece of completion(model + ending, messages, controller.signal)) {
      texts[i] += piece;
      places[i].textContent = texts[i];
      scroll();
    }
  }
  let problem = "";
  try {
    if (!model) await connect();
    await Promise.all(endings.map(write));
  } catch (error) {
    controller.abort();
    if (error.name !== "AbortError") problem = error.message;
  }
  if (reply !== controller) return;
  reply = null;
  item.ariaBusy = "false";
  replying(false);
  texts.forEach((each, i) => fill(places[i], each));
  const last = texts.at(-1);
  complain("error", problem);
  if (!last && controller.signal.aborted) {
    item.previousSibling.remove();
    item.remove();
    $("message").value ||= text;
    return;
  }
  offer(item, text);
  scroll();
  talk.push(asked, { role: "assistant", content: last });
  sessionStorage.setItem(`metakern.talk.${user.name}`, JSON.stringify(talk));
  announce(last);
}

function replying(yes) {
  if (document.activeElement === $(yes ? "send" : "stop")) $("message").focus();
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

// Ends the reply that is under way, and leaves it out of the conversation.
function abandon() {
  reply?.abort();
  reply = null;
  replying(false);
}

function begin() {
  abandon();
  talk = [];
  sessionStorage.removeItem(`metakern.talk.${user.name}`);
  $("log").replaceChildren();
  complain("error");
  $("message").focus();
}

// Teaching

async function teach(exchanges) {
  complain("refused");
  try {
    await request(mine("exchanges"), { method: "POST", body: { exchanges } });
    await refresh();
    return true;
  } catch (error) {
    complain("refused", error.message);
    return false;
  }
}

async function forget(path) {
  complain("refused");
  try {
    await request(mine(path), { method: "DELETE" });
    await refresh();
    ($("taught").querySelector("button") ?? $("say")).focus();
  } catch (error) {
    complain("refused", error.message);
  }
}

// Shows what was taught, and follows the adaptation to it.
async function refresh() {
  const look = ++looks;
  const { data } = await json(mine("exchanges"));
  if (look !== looks) return;
  $("forget").hidden = !data.length;
  $("taught").replaceChildren(...data.reverse().map(taught));
  if (!data.length) $("taught").append(element("li", { className: "say", textContent: "Nothing yet." }));
  watch(look, data.length);
}

function taught({ id, say: said, answer }) {
  const ask = element("button", { type: "button", className: "plain", textContent: "Ask" });
  const drop = element("button", { type: "button", className: "plain", textContent: "Forget" });
  ask.ariaLabel = `Ask: ${said}`;
  drop.ariaLabel = `Forget: ${said}`;
  ask.addEventListener("click", () => {
    show("chat");
    $("message").focus();
    send(said);
  });
  drop.addEventListener("click", () => forget(`exchanges/${id}`));
  return element(
    "li",
    {},
    element("p", { className: "say", textContent: said }),
    element("p", { textContent: answer }),
    element("div", { className: "row" }, ask, drop),
  );
}

// Returns the exchanges of a file of chat messages: JSON records, each on a line or in one array.
function exchangesOf(text) {
  let records;
  try {
    records = [JSON.parse(text)].flat();
  } catch {
    records = text.split("\n").flatMap((line, i) => {
      if (!line.trim()) return [];
      try {
        return [JSON.parse(line)];
      } catch {
        throw new Error(`Line ${i + 1} of the file is not JSON.`);
      }
    });
  }
  const found = records.flatMap((record, i) => {
    const messages = record?.messages;
    const valid = (each) => typeof each?.role === "string" && typeof each.content === "string";
    if (!Array.isArray(messages) || !messages.every(valid)) {
      throw new Error(`Record ${i + 1} of the file has no messages with role and content.`);
    }
    return messages.flatMap(({ role, content }, j) => {
      const before = messages[j - 1];
      return role === "assistant" && before?.role === "user" ? [{ say: before.content, answer: content }] : [];
    });
  });
  if (!found.length) throw new Error("The file has no message of a user with an answer of the assistant.");
  return found;
}

async function watch(look, count) {
  let learned = false;
  try {
    for (;;) {
      const now = await json(mine("adapt"));
      if (look !== looks) return;
      progress(now, count);
      if (now.state !== "waiting" && now.state !== "adapting") break;
      learned = true;
      await new Promise((go) => setTimeout(go, POLL));
    }
    if (learned) announce($("state").textContent);
  } catch (error) {
    if (look === looks) $("state").textContent = error.message;
  }
}

function progress({ state, seconds, error, curve }, count) {
  const last = curve.at(-1);
  const right = last && `${last.right} of ${last.replies} ${last.replies === 1 ? "reply" : "replies"} right`;
  const texts = {
    waiting: "Waiting to learn.",
    adapting: last ? `Learning: ${right} after ${last.steps} steps.` : "Learning.",
    failed: `Not learned: ${error}`,
    ready: last ? `Learned: ${right} after ${last.steps} steps, ${seconds.toFixed(1)} s.` : "Learned what is taught below.",
  };
  $("progress").dataset.state = state;
  $("to-teach").textContent = state === "adapting" || state === "waiting" ? "Teach (learning)" : "Teach";
  $("state").textContent = state === "ready" && !count ? "I know nothing of you yet." : texts[state];
  if (curve.length < 2 || !count) return $("curves").replaceChildren();
  const losses = curve.map(({ loss }) => loss ?? NaN);
  const rights = curve.map((step) => step.right);
  return $("curves").replaceChildren(
    figure("Replies right", `${rights[0]} → ${rights.at(-1)} of ${last.replies}`, rights, last.replies),
    figure("Loss", `${decimals(losses[0])} → ${decimals(losses.at(-1))}`, losses, Math.max(...losses.filter(isFinite))),
  );
}

const decimals = (value) => (isFinite(value) ? value.toFixed(2) : "not finite");

// Returns a chart of values from 0 to `most`, one for each step.
function figure(title, caption, values, most) {
  const points = values
    .map((value, i) => [(100 * i) / (values.length - 1), 40 - (40 * value) / (most || 1)])
    .filter(([, y]) => isFinite(y));
  const svg = shape("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", `${title} over ${values.length - 1} steps: ${caption}`);
  svg.append(
    shape("line", { class: "axis", x1: 0, x2: 100, y1: 40, y2: 40 }),
    shape("polyline", { class: "curve", points: points.map((xy) => xy.map((v) => v.toFixed(2)).join()).join(" ") }),
  );
  const text = element("figcaption", {}, title, element("b", { textContent: caption }));
  return element("figure", {}, text, svg);
}

// Light and dark

const night = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const chosen = localStorage.getItem("metakern.theme");
  const dark = chosen ? chosen === "dark" : night.matches;
  if (chosen) document.documentElement.dataset.theme = chosen;
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").ariaLabel = dark ? "Light colours" : "Dark colours";
  return dark;
}

// What the user does

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || reply) return;
  $("message").value = "";
  send(text);
});
$("stop").addEventListener("click", () => reply?.abort());
$("fresh").addEventListener("click", begin);

$("lesson").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!(await teach([{ say: $("say").value, answer: $("answer").value }]))) return;
  $("lesson").reset();
  $("say").focus();
});
$("file").addEventListener("change", async () => {
  try {
    const [file] = $("file").files;
    $("file").value = "";
    await teach(exchangesOf(await file.text()));
  } catch (error) {
    complain("refused", error.message);
  }
});
$("forget").addEventListener("click", () => confirm("Forget all that was taught?") && forget("exchanges"));

$("identity").addEventListener("submit", (event) => {
  event.preventDefault();
  user.name = $("name").value;
  user.token = $("token").value;
  localStorage.setItem("metakern.name", user.name);
  localStorage.setItem("metakern.token", user.token);
  $("who").close();
  enter();
});
$("user").addEventListener("click", () => identify());
$("help").addEventListener("click", () => $("keys").showModal());
$("theme").addEventListener("click", () => {
  localStorage.setItem("metakern.theme", paint() ? "light" : "dark");
  paint();
});
night.addEventListener("change", paint);
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => show(button.dataset.show));
}
for (const id of SAMPLING) {
  $(id).value = localStorage.getItem(`metakern.${id}`) ?? "";
  $(id).addEventListener("change", () => localStorage.setItem(`metakern.${id}`, $(id).value));
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && !event.shiftKey && event.target.tagName === "TEXTAREA") {
    event.preventDefault();
    event.target.form.requestSubmit();
  } else if (event.key === "Escape") {
    reply?.abort();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code.startsWith("Key")) {
    const target = document.querySelector(`[aria-keyshortcuts="Alt+${event.code.slice(3)}"]`);
    if (!target) return;
    event.preventDefault();
    const section = target.closest("section");
    if (section) show(section.id);
    if (target.tagName === "TEXTAREA") target.focus();
    else target.click();
  }
});

paint();
enter();
