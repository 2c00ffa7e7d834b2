// Models, machines and published figures of the explorer.

import { type Forward, type Machine, type Method, type Shape, reach } from "./speedup";

interface Dims {
  layers: number;
  hidden: number;
  inner: number;
  heads: number;
  kv: number;
  size: number;
  vocab: number;
}
function shape(d: Dims): Shape {
  const attention = d.hidden * d.size * (2 * d.heads + 2 * d.kv);
  return {
    layers: d.layers,
    hidden: d.hidden,
    vocab: d.vocab,
    heads: d.heads,
    kvHeads: d.kv,
    headSize: d.size,
    body: d.layers * (attention + 3 * d.hidden * d.inner),
    weightBytes: 2,
    cacheBytes: 2,
  };
}
const qwen = (layers: number, hidden: number, inner: number, heads: number): Shape =>
  shape({ layers, hidden, inner, heads, kv: 8, size: 128, vocab: 151936 });

/** By name; the configurations are those of the checkpoints. */
export const MODELS: Record<string, Shape> = {
  "Qwen3-0.6B": qwen(28, 1024, 3072, 16),
  "Qwen3-1.7B": qwen(28, 2048, 6144, 16),
  "Qwen3-4B": qwen(36, 2560, 9728, 32),
  "Qwen3-8B": qwen(36, 4096, 12288, 32),
  "Qwen3-14B": qwen(40, 5120, 17408, 40),
  "Qwen3-32B": qwen(64, 5120, 25600, 64),
  "Llama-3.1-8B": shape({
    layers: 32, hidden: 4096, inner: 14336, heads: 32, kv: 8, size: 128, vocab: 128256,
  }),
  "SmolLM2-135M": shape({
    layers: 30, hidden: 576, inner: 1536, heads: 9, kv: 3, size: 64, vocab: 49152,
  }),
};

interface Preset extends Machine {
  from: string;
}
/** Data sheets promise more than kernels reach. */
const READS = 0.8;
const WORKS = 0.6;
const sheet = (gigabytes: number, teraflops: number, fixed: number): Preset => ({
  bandwidth: gigabytes * 1e9 * READS,
  flops: teraflops * 1e12 * WORKS,
  fixed,
  overlap: 0.5,
  from: `data sheet, ${gigabytes} GB/s × ${READS} and ${teraflops} TFLOP/s × ${WORKS}; host time assumed`,
});
export const MACHINES: Record<string, Preset> = {
  H100: {
    bandwidth: 3.0e12, flops: 5.5e14, fixed: 2.0e-3, overlap: 0,
    from: "bandwidth measured; host time fitted to the paper's 141 tokens/s",
  },
  H200: {
    bandwidth: 4.12e12, flops: 5.5e14, fixed: 5.3e-3, overlap: 0,
    from: "fitted to step times of this project's engine",
  },
  B200: sheet(8000, 2250, 2e-3),
  "RTX 4090": sheet(1008, 165, 2e-3),
  "M4 Max": sheet(546, 34, 3e-3),
  "Zen 4 laptop": sheet(90, 2, 1e-3),
};

/** A drafter beside the model: EAGLE-3's layer runs once for each draft, DFlash's five layers once
 * for all. The model verifies a window of `stride` rows. */
export function drafter(name: string, acceptance: number[], stride: number, runs: number): Method {
  const verify: Forward = { rows: stride, masks: 0, headRows: stride, drafts: runs, count: 1 };
  const tokens = reach(acceptance, stride - 1).reduce((total, value) => total + value, 0);
  return { name, tokens, forwards: [verify] };
}
/** Parameters of so many layers of a model, and of a drafter's head over 32,000 tokens. */
export const drafterParameters = (model: Shape, layers: number): number =>
  (model.body / model.layers) * layers + 32_000 * model.hidden;

/** A figure that its authors published, on their hardware and data. `rows` are those for each token;
 * of drafters and blocks they are what follows from the block and the TPF, without the drafter. */
export interface Published {
  method: string;
  label: string;
  acceptance?: number;
  tpf?: number;
  rows?: number;
  speedup?: number;
  batch?: number;
  source: string;
}
const IDLM = "I-DLM, arXiv 2604.11035";
const A2 = "DSpark, arXiv 2607.05147, table 1: Qwen3-8B, T=1, block 7";
const A3 = "LiLiCorr, arXiv 2608.20530: Qwen3-8B, block 16, one H100";
const UNO = "vLLM #55947, one H100";
export const PUBLISHED: Published[] = [
  { method: "I-DLM", label: "N=4", acceptance: 0.9, tpf: 2.9, rows: 2.5, source: IDLM },
  { method: "I-DLM", label: "8B, 1 request", speedup: 322 / 141, batch: 1, source: `${IDLM}, H100` },
  { method: "I-DLM", label: "8B, 64", speedup: 6798 / 4597, batch: 64, source: `${IDLM}, H100` },
  { method: "SDAR", label: "N=4", acceptance: 0.5, tpf: 1.1, rows: 1.1 / 0.31, source: IDLM },
  { method: "TiDAR", label: "8B", speedup: 5.91, batch: 1, source: "arXiv 2511.08923" },
  { method: "TiDAR", label: "1.5B", speedup: 4.71, batch: 1, source: "arXiv 2511.08923" },
  { method: "TiDAR", label: "rows", rows: 7.8, source: `as shown by ${IDLM}` },
  { method: "EAGLE-3", label: "GSM8K", tpf: 5.3, rows: 8 / 5.3, source: A2 },
  { method: "EAGLE-3", label: "MT-Bench", tpf: 2.66, rows: 8 / 2.66, source: A2 },
  { method: "DFlash", label: "GSM8K", tpf: 6.34, rows: 16 / 6.34, speedup: 4.59, batch: 1, source: A3 },
  { method: "DFlash", label: "MATH500", tpf: 7.91, rows: 16 / 7.91, speedup: 5.88, batch: 1, source: A3 },
  { method: "LLaDA", label: "2.0-mini", tpf: 2.6, rows: 32 / 2.6, source: "LLaDA2.0, block 32" },
  { method: "LLaDA", label: "2.1-mini S", tpf: 5.34, rows: 32 / 5.34, source: "LLaDA2.1, block 32" },
  { method: "UNO", label: "1 stream", speedup: 2.6, batch: 1, source: UNO },
  { method: "UNO", label: "8 streams", speedup: 2.2, batch: 8, source: UNO },
  { method: "UNO", label: "32 streams", speedup: 1.7, batch: 32, source: UNO },
];
