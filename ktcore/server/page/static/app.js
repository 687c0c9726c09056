// The page: one conversation on show, one answer under way at most.
import { answer, models } from "./api.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
let current = store.conversations[0] ?? store.begin();
let running = null; // {abort, message} of the answer under way

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function showHistory() {
  $("history").replaceChildren(...store.conversations.map((c) =>
    element("div", {},
      element("button", { "aria-current": String(c === current), onclick: () => open(c) }, c.title || "New conversation"),
      element("button", { "aria-label": `Delete ${c.title || "conversation"}`, onclick: () => drop(c) }, "×"))));
}

function showMessages() {
  $("messages").replaceChildren(...current.messages.map(article));
  scrollDown();
}

function article(message, index) {
  const text = element("div", { class: "text" });
  const made = element("article", { class: message.role }, element("div", { class: "who" }, message.role === "user" ? "You" : message.model ?? "Model"), text);
  fill(made, message);
  const actions = element("div", { class: "actions" });
  if (message.role === "user") actions.append(element("button", { onclick: () => edit(index) }, "Edit"));
  else {
    actions.append(element("button", { onclick: () => copy(message.content) }, "Copy"));
    if (index === current.messages.length - 1) actions.append(element("button", { onclick: () => regenerate(index) }, "Regenerate"));
  }
  made.append(actions);
  return made;
}

function fill(made, message) {
  const text = made.querySelector(".text");
  text.replaceChildren();
  if (message.thought) text.append(element("details", { open: "" }, element("summary", {}, "Reasoning"), element("div", { class: "thought" }, message.thought)));
  if (message.role === "user") text.append(message.content);
  else text.append(markdown(message.content));
  if (message.error) text.append(element("p", { class: "error", role: "alert" }, message.error));
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function nearBottom() {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function open(conversation) {
  stop();
  current = conversation;
  $("side").classList.remove("open");
  showHistory();
  showMessages();
  $("prompt").focus();
}

function fresh() {
  const empty = store.conversations.find((c) => !c.messages.length);
  open(empty ?? store.begin());
}

function drop(conversation) {
  if (conversation === current) stop();
  store.remove(conversation);
  if (conversation === current) open(store.conversations[0] ?? store.begin());
  else showHistory();
}

function edit(index) {
  stop();
  const message = current.messages[index];
  const field = element("textarea", { rows: "3", "aria-label": "Edit your message" });
  field.value = message.content;
  const resend = () => {
    const content = field.value.trim();
    if (!content) return;
    current.messages.splice(index);
    ask(content);
  };
  const made = element("article", { class: "user" }, field, element("div", { class: "actions" },
    element("button", { onclick: resend }, "Send again"), element("button", { onclick: showMessages }, "Cancel")));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); resend(); }
    if (event.key === "Escape") { event.stopPropagation(); showMessages(); $("prompt").focus(); }
  });
  $("messages").children[index].replaceWith(made);
  field.focus();
}

function regenerate(index) {
  stop();
  current.messages.splice(index);
  reply();
}

async function copy(text) {
  await navigator.clipboard?.writeText(text).catch(() => {});
}

function ask(content) {
  current.messages.push({ role: "user", content });
  current.title ||= content.slice(0, 60);
  store.conversations.splice(store.conversations.indexOf(current), 1);
  store.conversations.unshift(current);
  store.save();
  showHistory();
  reply();
}

async function reply() {
  const conversation = current;
  const asked = conversation.messages.filter((m) => m.content && !m.error).map(({ role, content }) => ({ role, content }));
  if (store.settings.system.trim()) asked.unshift({ role: "system", content: store.settings.system });
  const message = { role: "assistant", content: "", model: $("model").value };
  conversation.messages.push(message);
  const mine = running = { abort: new AbortController(), message };
  showMessages();
  const shown = $("messages").lastElementChild;
  busy(true);
  const began = performance.now();
  let first = 0;
  let pieces = 0;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follow = nearBottom();
    fill(shown, message);
    if (follow) scrollDown();
  };
  const rate = (tokens) => {
    const seconds = (performance.now() - first) / 1000;
    if (tokens > 1 && seconds > 0) $("speed").textContent = `${((tokens - 1) / seconds).toFixed(1)} tokens/s · first after ${((first - began) / 1000).toFixed(2)} s`;
  };
  try {
    const usage = await answer(message.model, asked, store.settings, mine.abort.signal, (delta) => {
      first ||= performance.now();
      pieces++;
      message.content += delta.content;
      if (delta.thought) message.thought = (message.thought ?? "") + delta.thought;
      frame ||= requestAnimationFrame(draw);
      rate(pieces);
    });
    rate(usage?.completion_tokens ?? pieces);
  } catch (error) {
    if (error.name !== "AbortError") message.error = error.message || String(error);
  }
  cancelAnimationFrame(frame);
  store.save();
  if (running === mine) {
    running = null;
    busy(false);
  }
  if (conversation === current) {
    fill(shown, message);
    if (nearBottom()) scrollDown();
  }
}

function stop() {
  running?.abort.abort();
  running = null;
  busy(false);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
  store.saveTheme(dark ? "light" : "dark");
}

function toggleSettings() {
  $("settings").hidden = !$("settings").hidden;
  $("toggle-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
  if (!$("settings").hidden) $("system").focus();
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("prompt").value.trim();
  if (!content || running) return;
  $("prompt").value = "";
  grow();
  ask(content);
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  } else if (event.key === "ArrowUp" && !$("prompt").value) {
    const last = current.messages.findLastIndex((m) => m.role === "user");
    if (last >= 0) { event.preventDefault(); edit(last); }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const action = { KeyN: fresh, KeyS: toggleSettings, KeyT: switchTheme }[event.code];
  if (action) { event.preventDefault(); action(); }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", fresh);
$("theme").addEventListener("click", switchTheme);
$("toggle-settings").addEventListener("click", toggleSettings);
$("toggle-side").addEventListener("click", () => $("side").classList.toggle("open"));
$("settings").addEventListener("submit", (event) => event.preventDefault());
for (const name of Object.keys(store.settings)) {
  const field = $(name);
  if (!field) continue;
  field.value = store.settings[name];
  field.addEventListener("input", () => { store.settings[name] = field.value; store.saveSettings(); });
}
addEventListener("beforeunload", store.save);

setTheme(store.theme());
showHistory();
showMessages();
models().then((names) => $("model").replaceChildren(...names.map((name) => element("option", { value: name }, name)))).catch((error) => {
  $("speed").textContent = error.message;
});
