// `Run`: one answer as it comes, with its tokens, windows and speed.

import { type Endpoint, type Part, type Piece, type Token, type Window, stream } from "./api";
import { Painter } from "./painter";

export type Status = "waiting" | "running" | "done" | "stopped" | "failed";
/** What is kept of an answer in the browser: all but the alternatives of its tokens. */
export interface Kept {
  text: string;
  tokens: Token[];
  pieces: Piece[];
  windows: Window[];
  count: number;
  forwards: number;
  ttft: number;
  rate: number;
  seconds: number;
  status: Status;
  model: string;
  reason: string;
}
/** Seconds since the start, tokens, and characters by then. */
export type Mark = [number, number, number];

export class Run {
  model = "";
  text = "";
  tokens: Token[] = [];
  pieces: Piece[] = [];
  windows: Window[] = [];
  marks: Mark[] = [];
  /** Counts the changes of the arrays above, which are not tracked themselves. */
  version = $state(0);
  status = $state<Status>("waiting");
  count = $state(0);
  forwards = $state(0);
  seconds = $state(0);
  ttft = $state(0);
  rate = $state(0);
  error = $state("");
  reason = $state("");
  private painter = new Painter();
  private abort = new AbortController();
  private started = 0;
  private firstAt = 0;
  private lastAt = 0;
  private firstCount = 0;
  private counted = 0;
  private last = 0;
  private frame = 0;

  static of(kept: Kept): Run {
    const run = new Run();
    Object.assign(run, kept);
    run.version = 1;
    return run;
  }

  keep(): Kept {
    const { text, pieces, windows, count, forwards } = this;
    const tokens = this.tokens.map(({ top: _, ...token }) => token);
    const { ttft, rate, seconds, status, model, reason } = this;
    const answer = { text, tokens, pieces, windows, count, forwards };
    return { ...answer, ttft, rate, seconds, status, model, reason };
  }

  get active(): boolean {
    return this.status === "waiting" || this.status === "running";
  }

  /** Tokens per forward; null if the server does not say. */
  get tpf(): number | null {
    return this.forwards ? this.count / this.forwards : null;
  }

  stop(): void {
    if (!this.active) return;
    this.status = "stopped";
    this.abort.abort();
  }

  /** Run a request to its end; `failed` is called with what ended it early. */
  async go(
    endpoint: Endpoint,
    request: Record<string, unknown>,
    failed: (error: unknown) => void,
  ): Promise<void> {
    this.model = String(request.model);
    this.started = performance.now();
    try {
      for await (const part of stream(endpoint, request, this.abort.signal)) this.add(part);
      if (this.active) this.status = "done";
    } catch (error) {
      if (this.status !== "stopped") {
        this.status = "failed";
        this.error = error instanceof Error ? error.message : String(error);
        failed(error);
      }
    }
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.show();
  }

  private add(part: Part): void {
    const now = performance.now();
    this.text += part.text;
    this.pieces.push(...this.painter.paint(part, this.tokens));
    for (const window of part.windows) this.windows.push(window);
    const fresh = part.trace.length || part.logprobs.length || (part.text ? 1 : 0);
    this.counted = part.tokens ?? this.counted + fresh;
    if (part.reason) this.reason = part.reason;
    const forward = part.trace.at(-1)?.forward;
    if (forward) this.last = forward;
    if (fresh) {
      if (!this.firstAt) {
        this.firstAt = now;
        this.firstCount = this.counted;
        this.status = "running";
      }
      this.lastAt = now;
      this.marks.push([(now - this.started) / 1000, this.counted, this.text.length]);
    }
    if (!this.frame) {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.show();
      });
    }
  }

  /** Copy what is counted to what is shown, once a frame of the screen. */
  private show(): void {
    this.count = this.counted;
    this.forwards = this.last;
    const after = (this.lastAt - this.firstAt) / 1000;
    this.seconds = this.lastAt ? (this.lastAt - this.started) / 1000 : 0;
    this.ttft = this.firstAt ? (this.firstAt - this.started) / 1000 : 0;
    this.rate = after > 0 ? (this.count - this.firstCount) / after : 0;
    this.version += 1;
  }
}
