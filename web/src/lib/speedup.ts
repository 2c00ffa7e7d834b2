// The speed-up model: a port of idlm/evaluation/speedup.py, which says what the formulas mean.
// web/tests/speedup.spec.ts compares the two on a grid.

export interface Shape {
  layers: number;
  hidden: number;
  vocab: number;
  heads: number;
  kvHeads: number;
  headSize: number;
  body: number;
  weightBytes: number;
  cacheBytes: number;
}
export interface Machine {
  bandwidth: number;
  flops: number;
  fixed: number;
  overlap: number;
}
export interface Load {
  batch: number;
  context: number;
}
export interface Drafting {
  entryLayer: number;
  headParameters: number;
  adapter: number;
}
export const PLAIN: Drafting = { entryLayer: 0, headParameters: 0, adapter: 1 };

export interface Forward {
  rows: number;
  masks: number;
  headRows: number;
  drafts: number;
  count: number;
}
const forward = (rows: number, more: Partial<Forward> = {}): Forward => ({
  rows,
  masks: 0,
  headRows: 1,
  drafts: 0,
  count: 1,
  ...more,
});

export interface Method {
  name: string;
  tokens: number;
  forwards: Forward[];
}
export interface Speed {
  name: string;
  tpf: number;
  rows: number;
  overhead: number;
  seconds: number;
  tokensPerSecond: number;
  tokensPerSecondEach: number;
  speedup: number;
}

const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);
const forwardCount = (method: Method) => sum(method.forwards.map((one) => one.count));
export const tpf = (method: Method) => method.tokens / forwardCount(method);
export const rowsEach = (method: Method) =>
  sum(method.forwards.map((one) => one.count * (one.rows + one.masks))) / method.tokens;
export const efficiency = (method: Method) => tpf(method) / rowsEach(method);

/** r_0 .. r_drafts: the chance that the first k drafts are all accepted. */
export function reach(acceptance: number[], drafts: number): number[] {
  if (drafts && !acceptance.length) throw new RangeError("acceptance is empty");
  for (const value of acceptance)
    if (!(value >= 0 && value <= 1)) throw new RangeError(`acceptance ${value} is no probability`);
  const reached = [1];
  for (let depth = 0; depth < drafts; depth++)
    reached.push(
      (reached[depth] as number) * (acceptance[Math.min(depth, acceptance.length - 1)] as number),
    );
  return reached;
}

/** TPF of strided decoding; `branches` are the outcomes with MASK rows, null all of them. */
export function tokensPerForward(
  acceptance: number[],
  stride: number,
  branches: number[] | null = null,
): number {
  if (!(stride >= 1)) throw new RangeError(`stride ${stride} is below 1`);
  const drafts = stride - 1;
  const reached = [...reach(acceptance, drafts), 0];
  const outcomes = [...new Set(branches ?? Array.from({ length: stride }, (_, j) => j))];
  if (outcomes.some((j) => j < 0 || j > drafts)) throw new RangeError(`no outcomes: ${branches}`);
  const drafted = drafts
    ? sum(outcomes.map((j) => (reached[j] as number) - (reached[j + 1] as number)))
    : 1;
  return (sum(reached) + 1 - drafted) / (2 - drafted);
}

function choose(n: number, k: number): number {
  let value = 1;
  for (let i = 1; i <= k; i++) value = (value * (n - k + i)) / i;
  return value;
}

/** The expected forwards that unmask a block when each MASK is confident with that chance. */
export function denoisingSteps(block: number, confident: number): number {
  if (!(confident >= 0 && confident <= 1) || block < 1) throw new RangeError("no block");
  const steps = [0];
  for (let masked = 1; masked <= block; masked++) {
    let after = 0;
    for (let k = 0; k <= masked; k++) {
      const chance = choose(masked, k) * confident ** k * (1 - confident) ** (masked - k);
      const left = masked - Math.max(k, 1);
      if (left < masked) after += chance * (steps[left] as number);
    }
    steps.push(1 + after);
  }
  return steps[block] as number;
}

export const autoregressive = (): Method => ({ name: "ar", tokens: 1, forwards: [forward(1)] });

/** ISD: N verify rows, and K MASK rows for each branch. */
export function strided(
  acceptance: number[],
  stride: number,
  branches: number[] | null = null,
): Method {
  const drafts = stride - 1;
  const chosen = branches && [...new Set(branches)];
  const groups = drafts ? (chosen ? chosen.length : stride) : 0;
  const isChain = chosen?.length === 1 && chosen[0] === drafts;
  const kind = chosen ? (isChain ? "chain" : "branches") : "all";
  return {
    name: drafts ? `${kind}-${stride}` : "ar",
    tokens: tokensPerForward(acceptance, stride, branches),
    forwards: [forward(stride, { masks: groups * drafts, headRows: stride + drafts, drafts })],
  };
}

/** ISD as published: MASK rows only for the outcome that all drafts are accepted. */
export const chain = (acceptance: number[], stride: number): Method =>
  strided(acceptance, stride, [stride - 1]);

/** SDAR: the expected forwards over a block, and one that writes its KV. */
export function blockDiffusion(confident: number, block = 4, commit = true): Method {
  const denoise = forward(block, { headRows: block, count: denoisingSteps(block, confident) });
  const forwards = commit ? [denoise, forward(block, { headRows: 0 })] : [denoise];
  return { name: `sdar-${block}`, tokens: block, forwards };
}

/** LLaDA: forwards of the whole sequence, without a cache. */
export function wholeSequence(answer: number, steps: number, context = 0): Method {
  const rows = context + answer;
  return { name: "llada", tokens: answer, forwards: [forward(rows, { headRows: rows, count: steps })] };
}

/** UNO: a forward drafts, another verifies. */
export function twoForwards(acceptance: number[], stride: number): Method {
  const drafts = stride - 1;
  return {
    name: `two-forwards-${stride}`,
    tokens: 1 + sum(reach(acceptance, drafts)),
    forwards: [
      forward(1, { masks: drafts, headRows: stride, drafts }),
      forward(stride, { headRows: stride }),
    ],
  };
}

/** Seconds of reads and of arithmetic of a forward. */
export function parts(
  one: Forward,
  shape: Shape,
  machine: Machine,
  load: Load,
  drafting: Drafting = PLAIN,
): { memory: number; compute: number } {
  const head = shape.vocab * shape.hidden;
  const tokenBytes = 2 * shape.layers * shape.kvHeads * shape.headSize * shape.cacheBytes;
  const rows = one.rows + one.masks * (1 - drafting.entryLayer / shape.layers);
  const heads = one.drafts * drafting.headParameters;
  const attended = 4 * shape.layers * shape.heads * shape.headSize * load.context;
  const each =
    2 * shape.body * rows + 2 * head * one.headRows + attended * rows + 2 * heads;
  const bytes =
    (shape.body + head + heads) * shape.weightBytes + load.batch * load.context * tokenBytes;
  return { memory: bytes / machine.bandwidth, compute: (load.batch * each) / machine.flops };
}

export function forwardSeconds(
  one: Forward,
  shape: Shape,
  machine: Machine,
  load: Load,
  drafting: Drafting = PLAIN,
): number {
  const { memory, compute } = parts(one, shape, machine, load, drafting);
  const seconds = memory + compute - machine.overlap * Math.min(memory, compute);
  return machine.fixed + (one.masks ? drafting.adapter : 1) * seconds;
}

/** What a method reaches on a machine under a load. */
export function speed(
  method: Method,
  shape: Shape,
  machine: Machine,
  load: Load,
  drafting: Drafting = PLAIN,
): Speed {
  const one = forwardSeconds(forward(1), shape, machine, load);
  const cycle = sum(
    method.forwards.map((each) => each.count * forwardSeconds(each, shape, machine, load, drafting)),
  );
  const mean = cycle / forwardCount(method);
  const each = method.tokens / cycle;
  return {
    name: method.name,
    tpf: tpf(method),
    rows: rowsEach(method),
    overhead: mean / one,
    seconds: mean,
    tokensPerSecond: load.batch * each,
    tokensPerSecondEach: each,
    speedup: each * one,
  };
}
