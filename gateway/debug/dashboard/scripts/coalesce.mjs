// Coalesces frequent requests for the same work.

/**
 * Return a function that schedules `work` and can be called as often as you like. The work never
 * overlaps itself, and starts at least `gap` milliseconds after it last finished. If the function
 * is called while the work is running, it runs once more afterwards.
 *
 * @param {() => Promise<void>} work
 * @param {number} gap
 */
export function coalesced(work, gap) {
  let scheduled = false;
  let busy = false;
  let again = false;
  let last = -Infinity;

  async function run() {
    scheduled = false;
    busy = true;
    try {
      await work();
    } finally {
      busy = false;
      last = performance.now();
      if (again) soon();
    }
  }

  function soon() {
    again = busy;
    if (busy || scheduled) return;
    scheduled = true;
    setTimeout(run, Math.max(0, last + gap - performance.now()));
  }

  return soon;
}
