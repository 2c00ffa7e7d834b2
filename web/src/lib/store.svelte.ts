// What the page keeps in the browser: conversations, settings, the theme. Nothing leaves it.

import { DEFAULTS, type Message, type Model, type Settings } from "./api";
import { type Kept, Run } from "./run.svelte";

export interface Turn {
  role: Message["role"];
  content: string;
  run?: Run;
}
export interface Conversation {
  id: string;
  title: string;
  turns: Turn[];
}
interface KeptConversation extends Omit<Conversation, "turns"> {
  turns: (Message & { run?: Kept })[];
}

const CONVERSATION = "idlm.conversation.";
const ORDER = "idlm.conversations";
const SETTINGS = "idlm.settings";

function read<T>(name: string, otherwise: T): T {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "null") ?? otherwise;
  } catch {
    return otherwise;
  }
}

function fresh(): Conversation {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16));
  return { id: id.join(""), title: "New conversation", turns: [] };
}

function loaded(): Conversation[] {
  const ids = read<string[]>(ORDER, []);
  const kept = ids.map((id) => read<KeptConversation | null>(CONVERSATION + id, null));
  const found = kept.flatMap((one) => (one ? [{ ...one, turns: one.turns.map(opened) }] : []));
  return found.length ? found : [fresh()];
}

const opened = ({ role, content, run }: KeptConversation["turns"][number]): Turn => ({
  role,
  content,
  run: run && Run.of(run),
});

class Store {
  conversations = $state<Conversation[]>(loaded());
  current = $state(0);
  settings = $state<Settings>({ ...DEFAULTS, ...read<Partial<Settings>>(SETTINGS, {}) });
  models = $state.raw<Model[]>([]);
  model = $state("");
  /** The answer that the step view shows. */
  chosen = $state.raw<Run | null>(null);
  needsKey = $state(false);
  problem = $state("");

  get conversation(): Conversation {
    return this.conversations[this.current] ?? (this.conversations[0] as Conversation);
  }

  /** All answers of the conversation that have windows or tokens to show. */
  get answers(): Run[] {
    return this.conversation.turns.flatMap((turn) => (turn.run ? [turn.run] : []));
  }

  create(): void {
    if (this.conversation.turns.length) this.conversations.unshift(fresh());
    this.current = 0;
  }

  remove(index: number): void {
    const [gone] = this.conversations.splice(index, 1);
    if (gone) localStorage.removeItem(CONVERSATION + gone.id);
    if (!this.conversations.length) this.conversations.push(fresh());
    this.current = Math.min(this.current, this.conversations.length - 1);
    this.saveOrder();
  }

  saveSettings(): void {
    localStorage.setItem(SETTINGS, JSON.stringify(this.settings));
  }

  /** Write the current conversation down. If the browser's room is used up, what its answers are
   * made of goes, the longest first, and then the oldest conversations. */
  save(): void {
    const { id, title, turns } = this.conversation;
    const kept: KeptConversation = {
      id,
      title,
      turns: turns.map(({ role, content, run }) => ({ role, content, run: run?.keep() })),
    };
    const heavy = kept.turns.filter((turn) => turn.run);
    heavy.sort((a, b) => (a.run?.count ?? 0) - (b.run?.count ?? 0));
    for (;;) {
      try {
        localStorage.setItem(CONVERSATION + id, JSON.stringify(kept));
        return this.saveOrder();
      } catch {
        const turn = heavy.pop();
        if (turn) delete turn.run;
        else if (!this.forget(id)) return;
      }
    }
  }

  private saveOrder(): void {
    const named = this.conversations.filter((one) => one.turns.length).map((one) => one.id);
    localStorage.setItem(ORDER, JSON.stringify(named));
  }

  /** Take the oldest conversation but this one out of the browser; false if there is none. */
  private forget(id: string): boolean {
    const oldest = read<string[]>(ORDER, []).findLast(
      (one) => one !== id && localStorage.getItem(CONVERSATION + one) !== null,
    );
    if (oldest) localStorage.removeItem(CONVERSATION + oldest);
    return oldest !== undefined;
  }
}

export const store = new Store();
