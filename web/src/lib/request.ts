// Which model a request names, and what it asks for.

import { AR_SUFFIX, type Message, type Settings, body, isIdlm } from "./api";
import { store } from "./store.svelte";

/** Whether the server can decode the chosen model without drafts. */
export const canDraft = (): boolean =>
  store.models.some((one) => one.id.endsWith(AR_SUFFIX));

export function request(messages: Message[], settings: Settings, drafting: boolean) {
  const card = store.models.find((one) => one.id === store.model);
  const name = drafting || !canDraft() ? store.model : arName();
  return body(name, messages, settings, isIdlm(card));
}

function arName(): string {
  const own = store.model + AR_SUFFIX;
  const found = store.models.find((one) => one.id === own);
  return (found ?? store.models.find((one) => one.id.endsWith(AR_SUFFIX)))?.id ?? store.model;
}
