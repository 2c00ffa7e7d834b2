/** A log-probability as a percentage. */
export function percent(logprob: number): string {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

/** A token with its white space to see. */
export const visible = (text: string): string =>
  text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

export const fixed = (value: number | null, digits = 2): string =>
  value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);

/** Seconds, in milliseconds if short. */
export const seconds = (value: number): string =>
  !value ? "–" : value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`;

/** A large number with its unit: 12.3k. */
export function short(value: number): string {
  if (!Number.isFinite(value)) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]] as const)
    if (Math.abs(value) >= size) return `${(value / (unit === "k" ? 1e3 : size)).toPrecision(3)}${unit}`;
  return value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}
