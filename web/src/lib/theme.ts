const NAME = "idlm.theme";
export const THEMES = ["auto", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

function stored(): string | null {
  try {
    return localStorage.getItem(NAME);
  } catch {
    return null; // file:// in some browsers
  }
}

export function theme(): Theme {
  const found = stored();
  return THEMES.find((one) => one === found) ?? "auto";
}

export function setTheme(chosen: Theme): void {
  document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem(NAME, chosen);
  } catch {
    // it holds for this visit
  }
}
