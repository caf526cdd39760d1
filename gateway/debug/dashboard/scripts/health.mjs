// Shows whether LM Studio is reachable, and the gateway's version.

import { readJson } from "./api.mjs";
import { coalesced } from "./coalesce.mjs";
import { byId, show, write } from "./elements.mjs";

const REFRESH_MS = 15_000;

const pill = byId("lmstudio");
let checkedAt = -Infinity;

export const healthSoon = coalesced(async () => {
  try {
    const { lmstudio, version } = await readJson("../health");
    pill.dataset.is = lmstudio.connected ? "good" : "bad";
    write(pill, lmstudio.connected ? "LM Studio connected" : "LM Studio unreachable");
    pill.title = lmstudio.error ?? "";
    write(byId("about"), `lmstudio-gateway ${version}`);
    checkedAt = performance.now();
    show(pill, true);
  } catch {
    hideHealth();
  }
}, 1000);

export function refreshHealth() {
  if (performance.now() - checkedAt > REFRESH_MS) healthSoon();
}

export function hideHealth() {
  show(pill, false);
}
