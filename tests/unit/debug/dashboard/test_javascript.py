"""The dashboard's JavaScript under node: its own tests, and the assembled script."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

import gateway.debug.dashboard
from gateway.debug.dashboard.assembly import assemble, bundle
from tests.nginx import require

HERE = Path(__file__).parent

#: Modules that use every form that is supported, the same private name in each, and an order of
#: evaluation that can be seen.
MODULES = {
    "main": """
import { Late } from "./late.mjs";
import {
  count,
  numbers,
} from "./early.mjs";
import "./effect.mjs";

const secret = "main's";
console.log(secret, count(), count(), new Late().name);
(async () => {
  for await (const one of numbers()) console.log(one);
})();
""",
    "late": """
import { count } from "./early.mjs";
const secret = "late's";
export class Late {
  name = `${secret} ${count()}`;
}
console.log("late");
""",
    "early": """
console.log("early");
let secret = 0;
export function count() {
  secret += STEP;
  return secret;
}
export const STEP = 2;
export async function* numbers() {
  yield* pair();
}
export function* pair() {
  yield 1;
  yield 2;
}
""",
    "effect": """
console.log("effect", typeof secret);
""",
}


def run(*command: str | Path) -> str:
    done = subprocess.run([require("node"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_modules_pass_their_tests() -> None:
    tests = sorted(HERE.glob("*.test.mjs"))
    assert tests
    run("--test", *tests)


def test_the_assembled_script_is_javascript(tmp_path: Path) -> None:
    script = tmp_path / "dashboard.mjs"
    script.write_text(assemble(files(gateway.debug.dashboard)).script, "utf-8")
    run("--check", script)


def test_assembled_modules_do_what_they_do_separately(tmp_path: Path) -> None:
    separate = tmp_path / "separate"
    separate.mkdir()
    for name, source in MODULES.items():
        (separate / f"{name}.mjs").write_text(source)
    together = tmp_path / "together.mjs"
    together.write_text(bundle(separate, "main"))
    printed = run(together)
    assert printed == run(separate / "main.mjs")
    assert printed.splitlines()[:3] == ["early", "late", "effect undefined"]
