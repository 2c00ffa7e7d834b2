// The API of an idlm server, or of any server with OpenAI's, as far as the page uses it.

export type Source = "first" | "accepted" | "corrected" | "bonus";
export const MEANING: Record<Source, string> = {
  first: "of the first forward, which has no drafts",
  accepted: "a draft that AR would have chosen too",
  corrected: "a wrong draft, replaced",
  bonus: "the token after the drafts, all accepted",
};

export interface Named {
  token: string;
  id: number;
}
export interface TraceEntry extends Named {
  source: Source;
  forward: number;
}
export interface Window {
  forward: number;
  position: number;
  plan: string;
  width: number;
  pending: Named;
  drafts: Named[];
  accepted: number;
  outcomes: number[];
  masks: number;
}
export interface Likely {
  token: string;
  logprob: number;
}
/** A token with all that is known of it. */
export interface Token extends Named {
  source?: Source;
  forward?: number;
  logprob?: number;
  top?: Likely[];
}
/** A part of an answer's text, and the index of its token; -1 if that is not known. */
export interface Piece {
  text: string;
  at: number;
}
export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}
export interface Model {
  id: string;
  owned_by?: string;
}
export interface Settings {
  system: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  max_tokens: string;
  seed: string;
  drafting: boolean;
  probabilities: boolean;
}
export const DEFAULTS: Settings = {
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "256",
  seed: "",
  drafting: true,
  probabilities: true,
};
export const AR_SUFFIX = ":ar";

export class KeyNeeded extends Error {}

/** Where requests go: the base URL of an API, which ends with /v1, and its key. */
export interface Endpoint {
  base: string;
  key: string | null;
}

const KEY = "idlm.key";
export const here = (): Endpoint => ({
  base: new URL("v1", location.href.split(/[?#]/)[0]).href,
  key: sessionStorage.getItem(KEY),
});
export const keepKey = (key: string) => sessionStorage.setItem(KEY, key);

function headers({ key }: Endpoint): Record<string, string> {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refused(response: Response): Promise<Error> {
  const text = await response.text();
  let message = text.slice(0, 500);
  try {
    const body = JSON.parse(text);
    message = body.error?.message ?? body.message ?? message;
  } catch {
    // not JSON: the text itself
  }
  return response.status === 401
    ? new KeyNeeded(message)
    : new Error(`${response.status}: ${message}`);
}

export async function models(endpoint: Endpoint): Promise<Model[]> {
  const response = await fetch(`${endpoint.base}/models`, { headers: headers(endpoint) });
  if (!response.ok) throw await refused(response);
  return (await response.json()).data;
}

export const isIdlm = (model: Model | undefined): boolean => model?.owned_by === "idlm";

function numbers(settings: Settings): Record<string, number> {
  const names = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"] as const;
  const given = names.filter((name) => String(settings[name] ?? "").trim() !== "");
  return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

/** The body of a chat request; fields that only idlm has are left out for other servers. */
export function body(
  model: string,
  messages: Message[],
  settings: Settings,
  extended: boolean,
): Record<string, unknown> {
  const system: Message[] = settings.system.trim()
    ? [{ role: "system", content: settings.system }]
    : [];
  const sampling = numbers(settings);
  if (!extended) for (const name of ["top_k", "min_p"]) delete sampling[name];
  const shown = extended ? { idlm: { windows: true } } : {};
  const likely = settings.probabilities ? { logprobs: true, top_logprobs: 5 } : {};
  return {
    model,
    messages: [...system, ...messages],
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
    ...shown,
    ...likely,
  };
}

/** What one event of a stream adds. */
export interface Part {
  text: string;
  trace: TraceEntry[];
  windows: Window[];
  logprobs: { token: string; logprob: number; top_logprobs?: Likely[] }[];
  tpf?: number;
  reason?: string;
  tokens?: number;
}

function parsed(data: string): Part {
  const event = JSON.parse(data);
  if (event.error) throw new Error(event.error.message ?? String(event.error));
  const choice = event.choices?.[0];
  const delta = choice?.delta ?? {};
  return {
    text: (delta.reasoning_content ?? delta.reasoning ?? "") + (delta.content ?? ""),
    trace: choice?.idlm?.trace ?? [],
    windows: choice?.idlm?.windows ?? [],
    logprobs: choice?.logprobs?.content ?? [],
    tpf: choice?.idlm?.tpf,
    reason: choice?.finish_reason ?? undefined,
    tokens: event.usage?.completion_tokens ?? undefined,
  };
}

/** Send a chat request and yield the parts of its answer as they come. */
export async function* stream(
  endpoint: Endpoint,
  request: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Part> {
  const response = await fetch(`${endpoint.base}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(endpoint) },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok || !response.body) throw await refused(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (held + value).split(/\r?\n/);
      held = lines.pop() ?? "";
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield parsed(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
