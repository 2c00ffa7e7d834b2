// The port of the speed-up model against idlm/evaluation/speedup.py, whose results on a grid are in
// speedup.json. A Python test compares that file with the model.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "@playwright/test";
import {
  type Drafting, type Load, type Machine, type Method, type Shape, type Speed, autoregressive,
  blockDiffusion, chain, efficiency, speed, strided, tokensPerForward, twoForwards, wholeSequence,
} from "../src/lib/speedup";

interface Case {
  method: [string, ...unknown[]];
  shape: number;
  machine: number;
  load: number;
  drafting: number;
  speed: Speed;
  efficiency: number;
}
interface Grid {
  shapes: Shape[];
  machines: Machine[];
  loads: Load[];
  draftings: Drafting[];
  cases: Case[];
}
const METHODS: Record<string, (...given: never[]) => Method> = {
  autoregressive, strided, chain, blockDiffusion, wholeSequence, twoForwards,
};
const grid: Grid = JSON.parse(readFileSync(join(import.meta.dirname, "speedup.json"), "utf8"));

test("the port gives what the model gives", () => {
  expect(grid.cases.length).toBeGreaterThan(200);
  for (const one of grid.cases) {
    const [name, ...given] = one.method;
    const method = (METHODS[name] as (...given: unknown[]) => Method)(...given);
    const found = speed(
      method,
      grid.shapes[one.shape] as Shape,
      grid.machines[one.machine] as Machine,
      grid.loads[one.load] as Load,
      grid.draftings[one.drafting],
    );
    expect(found.name).toBe(one.speed.name);
    for (const [field, value] of Object.entries(one.speed))
      if (typeof value === "number")
        expect((found[field as keyof Speed] as number) / value, `${one.method} ${field}`).toBeCloseTo(1, 9);
    expect(efficiency(method)).toBeCloseTo(one.efficiency, 9);
  }
});

test("the closed forms of the paper", () => {
  expect(tokensPerForward([0.9], 4)).toBeCloseTo(3.439, 3);
  expect(tokensPerForward([0.9], 4, [3])).toBeCloseTo(2.919, 3);
  expect(() => tokensPerForward([], 4)).toThrow();
});
