// What the browser keeps: conversations, settings, theme. Nothing of it leaves this browser but as a request's messages.
const PREFIX = "ktcore.";
const DEFAULTS = { system: "", temperature: "0.7", top_p: "1", top_k: "0", min_p: "0", max_tokens: "1024", seed: "" };

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(PREFIX + key, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or not allowed: the page works on without a memory
  }
}

export const settings = { ...DEFAULTS, ...read("settings", {}) };
export const saveSettings = () => write("settings", settings);
export const theme = () => read("theme", null);
export const saveTheme = (name) => write("theme", name);

// Newest first; each {id, title, messages: [{role, content, thought?, error?}]}.
export const conversations = read("conversations", []);

export function save() {
  // oldest ones go when the browser's room is used up
  const kept = [...conversations];
  while (!write("conversations", kept.filter((c) => c.messages.length)) && kept.length > 1) kept.pop();
}

export function begin() {
  const made = { id: crypto.randomUUID?.() ?? String(Date.now()), title: "", messages: [] };
  conversations.unshift(made);
  return made;
}

export function remove(conversation) {
  conversations.splice(conversations.indexOf(conversation), 1);
  save();
}
