// The server's OpenAI-compatible interface: the models, and an answer token by token.

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function faultOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? `${response.status} ${response.statusText}`;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** The base and the adapters that the server knows. */
export async function models(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await faultOf(response));
  return (await response.json()).data;
}

/** What an adapter's files tell about it; nothing where they cannot be read. */
export async function card(name, key) {
  const response = await fetch(`v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`, { headers: headers(key) });
  return response.ok ? response.json() : {};
}

/** The pieces of an answer as they come: {text, tokens: [{token, logprob}], usage}. A base without a template continues text. */
export async function* answer({ messages, ...request }, chats, key, signal) {
  const asked = chats ? { messages, logprobs: true } : { prompt: messages.map((message) => message.content).join("\n\n"), logprobs: 0 };
  const response = await fetch(chats ? "v1/chat/completions" : "v1/completions", {
    method: "POST", headers: headers(key), signal,
    body: JSON.stringify({ ...request, ...asked, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw new Error(await faultOf(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new Error(piece.error.message);
    const choice = piece.choices?.[0];
    yield { text: choice?.delta?.content ?? choice?.text ?? "", tokens: tokensOf(choice?.logprobs), usage: piece.usage };
  }
}

/** The tokens of a chat's log-probabilities, or of a completion's. */
function tokensOf(logprobs) {
  return logprobs?.content ?? (logprobs?.tokens ?? []).map((token, n) => ({ token, logprob: logprobs.token_logprobs[n] }));
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}
