// The explorer's settings, in the URL, and what follows from them.

import { MACHINES, MODELS, drafter, drafterParameters } from "./presets";
import {
  type Drafting, type Load, type Machine, type Method, type Shape, type Speed, PLAIN, autoregressive,
  blockDiffusion, chain, parts, speed, strided, twoForwards, wholeSequence,
} from "./speedup";

export interface Choice {
  acceptance: string;
  stride: number;
  branches: "all" | "chain";
  head: boolean;
  adapter: number;
  entry: number;
  batch: number;
  context: number;
  machine: string;
  bandwidth: number;
  teraflops: number;
  fixed: number;
  overlap: number;
  model: string;
  weightBytes: number;
}
export const USUAL: Choice = {
  acceptance: "0.9",
  stride: 4,
  branches: "all",
  head: false,
  adapter: 1,
  entry: 0,
  batch: 1,
  context: 1024,
  machine: "H100",
  bandwidth: 3000,
  teraflops: 550,
  fixed: 2,
  overlap: 0,
  model: "Qwen3-8B",
  weightBytes: 2,
};
export const CUSTOM = "custom";
export const MOST_STRIDE = 16;
const MOST_ROWS = 64;
const HEAD_RANK = 256;

export function toQuery(choice: Choice): string {
  const changed = Object.entries(choice).filter(
    ([name, value]) => value !== USUAL[name as keyof Choice],
  );
  return new URLSearchParams(changed.map(([name, value]) => [name, String(value)])).toString();
}

export function fromQuery(query: string): Choice {
  const found = new URLSearchParams(query);
  const choice: Record<string, unknown> = { ...USUAL };
  for (const [name, usual] of Object.entries(USUAL)) {
    const text = found.get(name);
    if (text === null) continue;
    if (typeof usual === "boolean") choice[name] = text === "true";
    else if (typeof usual === "string") choice[name] = text;
    else if (Number.isFinite(Number(text))) choice[name] = Number(text);
  }
  const made = choice as unknown as Choice;
  if (!(made.model in MODELS)) made.model = USUAL.model;
  if (!(made.machine in MACHINES)) made.machine = CUSTOM;
  if (made.branches !== "chain") made.branches = "all";
  return made;
}

/** Acceptance by depth; what is no probability is left out. */
export function depths(text: string): number[] {
  const found = text.split(/[\s,;]+/).filter(Boolean).map(Number);
  const good = found.filter((value) => value >= 0 && value <= 1);
  return good.length ? good : [Number(USUAL.acceptance)];
}

export interface Setup {
  acceptance: number[];
  shape: Shape;
  machine: Machine;
  load: Load;
  drafting: Drafting;
}

export function setup(choice: Choice): Setup {
  const model = MODELS[choice.model] as Shape;
  const machine = MACHINES[choice.machine] ?? {
    bandwidth: choice.bandwidth * 1e9,
    flops: choice.teraflops * 1e12,
    fixed: choice.fixed * 1e-3,
    overlap: choice.overlap,
  };
  return {
    acceptance: depths(choice.acceptance),
    shape: { ...model, weightBytes: choice.weightBytes },
    machine,
    load: { batch: Math.max(1, choice.batch), context: Math.max(0, choice.context) },
    drafting: {
      entryLayer: Math.min(choice.entry, model.layers),
      headParameters: choice.head ? HEAD_RANK * (model.vocab + model.hidden) : 0,
      adapter: choice.adapter,
    },
  };
}

export const isd = (setup: Setup, stride: number, branches: "all" | "chain"): Method =>
  (branches === "chain" ? chain : strided)(setup.acceptance, stride);

export interface Curve {
  name: string;
  method: (setup: Setup, stride: number) => Method;
  drafting?: (setup: Setup) => Drafting;
}
const beside = (layers: number) => (setup: Setup): Drafting => ({
  ...PLAIN,
  headParameters: drafterParameters(setup.shape, layers),
});
const ANSWER = 256;
/** Every method at the acceptance and the stride that are set. SDAR takes the acceptance as the
 * chance that a MASK is confident; LLaDA unmasks `stride` tokens a step; TiDAR is ISD with all
 * outcomes at its own draft length. */
export const CURVES: Curve[] = [
  { name: "ISD, all outcomes", method: (one, stride) => isd(one, stride, "all"), drafting: (one) => one.drafting },
  { name: "I-DLM", method: (one, stride) => isd(one, stride, "chain"), drafting: (one) => one.drafting },
  { name: "SDAR", method: (one, stride) => blockDiffusion(one.acceptance[0] as number, Math.max(1, stride)) },
  { name: "LLaDA", method: (one, stride) => wholeSequence(ANSWER, Math.ceil(ANSWER / stride), one.load.context) },
  { name: "TiDAR", method: (one) => strided(one.acceptance, 16) },
  { name: "UNO", method: (one, stride) => twoForwards(one.acceptance, stride), drafting: (one) => one.drafting },
  { name: "EAGLE-3", method: (one, stride) => drafter("eagle-3", one.acceptance, stride, stride - 1), drafting: beside(1) },
  { name: "DFlash", method: (one, stride) => drafter("dflash", one.acceptance, stride, stride > 1 ? 1 : 0), drafting: beside(5) },
];

export function reached(setup: Setup, method: Method, drafting = setup.drafting): Speed {
  return speed(method, setup.shape, setup.machine, setup.load, drafting);
}

/** The batch from which a forward of this method is bound by arithmetic; null: never. */
export function knee(setup: Setup, method: Method): number | null {
  const one = method.forwards[0];
  if (!one) return null;
  const at = (batch: number) =>
    parts(one, setup.shape, setup.machine, { ...setup.load, batch }, setup.drafting);
  const [first, second] = [at(1), at(2)];
  const growth = second.compute - first.compute - (second.memory - first.memory);
  const fixed = 2 * first.memory - second.memory - (2 * first.compute - second.compute);
  return growth > 0 ? Math.max(0, fixed / growth) : null;
}

/** The plan with the most tokens a second. */
export function best(setup: Setup): { plan: string; speed: Speed } {
  const plans = [autoregressive()];
  for (let stride = 2; stride <= MOST_STRIDE; stride++) {
    plans.push(isd(setup, stride, "chain"));
    if (stride * stride <= MOST_ROWS) plans.push(isd(setup, stride, "all"));
  }
  const speeds = plans.map((plan) => reached(setup, plan));
  const found = speeds.reduce((top, one) => (one.tokensPerSecond > top.tokensPerSecond ? one : top));
  return { plan: found.name, speed: found };
}

/** A measured run: what a results file or a report of `idlm bench --json` says. */
export interface Measured {
  label: string;
  tpf?: number;
  speedup?: number;
  acceptance?: number[];
}

/** All measured runs in a JSON value: objects with TPF, speed-up or acceptance by depth. */
export function measuredIn(value: unknown, path: string[] = []): Measured[] {
  if (Array.isArray(value)) return value.flatMap((one, at) => measuredIn(one, [...path, String(at)]));
  if (typeof value !== "object" || value === null) return [];
  const found = value as Record<string, unknown>;
  const number = (name: string) => (typeof found[name] === "number" ? (found[name] as number) : undefined);
  const list = found.acceptance;
  const acceptance =
    Array.isArray(list) && list.length && list.every((one) => typeof one === "number" && one >= 0 && one <= 1)
      ? (list as number[])
      : undefined;
  const tpf = number("tpf");
  const inside = Object.entries(found).flatMap(([name, one]) => measuredIn(one, [...path, name]));
  if (tpf === undefined && acceptance === undefined) return inside;
  const label = String(found.plan ?? found.name ?? path.filter((one) => one !== "results").join(" "));
  return [{ label, tpf, speedup: number("speedup"), acceptance }, ...inside];
}
