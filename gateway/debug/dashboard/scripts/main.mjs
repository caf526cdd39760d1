// The entry point: connects the controls that belong to the page as a whole, and starts.

import { drawCharts } from "./charts.mjs";
import { isLive } from "./connection.mjs";
import { byId, write } from "./elements.mjs";
import { askForKey } from "./entrance.mjs";
import { follow, retryNow } from "./follow.mjs";
import { refreshHealth } from "./health.mjs";
import "./load_dialog.mjs";
import { refreshModels } from "./models.mjs";
import { drawElapsed, refreshStatus } from "./requests.mjs";
import { disconnect, signIn } from "./session.mjs";

/** What a header can contain: printable ASCII without spaces. */
const SENDABLE = /^[\x21-\x7e]+$/;

byId("sign-in-form").onsubmit = (event) => {
  event.preventDefault();
  const field = byId("key", HTMLInputElement);
  const key = field.value.trim();
  field.value = "";
  write(byId("sign-in-problem"), "");
  if (!SENDABLE.test(key)) {
    askForKey("A key can't contain spaces or non-ASCII characters.");
    return;
  }
  signIn(key);
  follow();
};
byId("forget").onclick = () => askForKey("");
byId("trouble-now").onclick = retryNow;
for (const button of document.querySelectorAll("dialog [data-close]")) {
  button.addEventListener("click", () => button.closest("dialog")?.close());
}

// The browser may keep this page for its Back button, with its connections; and it allows only a
// few connections per host.
addEventListener("pagehide", disconnect);
addEventListener("pageshow", ({ persisted }) => {
  if (persisted) location.reload();
});
addEventListener("online", retryNow);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) retryNow();
});

setInterval(() => {
  if (document.hidden || byId("dashboard").hidden) return;
  drawCharts();
  if (!isLive()) return;
  drawElapsed();
  refreshStatus();
  refreshModels();
  refreshHealth();
}, 1000);

follow();
