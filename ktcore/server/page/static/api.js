// The server's OpenAI routes: names of models, and an answer as it comes.

async function refused(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

export async function models() {
  const response = await fetch("v1/models");
  if (!response.ok) throw new Error(await refused(response));
  return (await response.json()).data.map((m) => m.id);
}

function number(text) {
  const value = Number(text);
  return text === "" || Number.isNaN(value) ? undefined : value;
}

// Calls onDelta({content, thought}) for each piece; returns the usage that the server counted. Throws what it refused.
export async function answer(model, messages, settings, signal, onDelta) {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    const value = number(settings[name]);
    if (value !== undefined) body[name] = value;
  }
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await refused(response));
  let usage = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const delta = event.choices?.[0]?.delta ?? {};
    if (delta.content || delta.reasoning_content) onDelta({ content: delta.content ?? "", thought: delta.reasoning_content ?? "" });
  }
  return usage;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
