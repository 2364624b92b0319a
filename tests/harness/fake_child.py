"""A training child that follows a script instead of training: `python -m tests.harness.fake_child --workdir W`.

The script is JSON in the training file of the spec: {"steps": 4, "checkpoint_every": 2, "step_s": 0.01, "crash":
"..."}. It speaks the real child's events and knows nothing of torch. `stop_in_step` is a step (from 0) in whose middle
it is asked to stop, however long that takes. Crash points: kill_at_step, exit_at_step, hang_at_step, garbage_at_step,
fail_user_at_step, fail_platform_at_step (with a `cause`), corrupt_checkpoint, stop_unasked_at_step; `grandchild` leaves
a process behind that holds the output open, `daemon` one outside of the child's group.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 10


def emit(kind: str, /, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"type": kind, "elapsed_s": 0.0, **fields}) + "\n")
    sys.stdout.flush()


def files_in(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "path": path.relative_to(folder).as_posix(),
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.name != "manifest.json"
    ]


def revision_of(files: list[dict[str, Any]]) -> str:
    lines = sorted(f"{file['path']}\0{file['sha256']}\n" for file in files)
    return "rv_" + hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def exit_when_orphaned() -> None:
    while os.read(0, 4096):
        continue
    os._exit(4)


def await_work() -> Path:
    emit("ready")
    return Path(json.loads(sys.stdin.readline())["workdir"])


class FakeRun:
    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.spec = json.loads((workdir / "spec.json").read_text())
        self.script = self.read_script()
        self.steps = int(self.script.get("steps", 4))
        self.every = int(self.script.get("checkpoint_every", 2))
        self.stop = threading.Event()
        self.range_start = 0
        self.records: list[dict[str, Any]] = []

    def read_script(self) -> dict[str, Any]:
        return json.loads((self.workdir / self.spec["train_file"]).read_text())

    def live(self) -> int:
        self.note_pid()
        start = self.resumed_step()
        self.range_start = start
        emit(
            "started",
            total_steps=self.steps,
            steps_per_epoch=self.steps,
            start_step=start,
            evaluations_total=0,
            train_token_count=self.script.get("train_token_count", self.steps * TOKENS_PER_STEP),
            validation_token_count=0,
            trained_tokens=start * TOKENS_PER_STEP,
        )
        for step in range(start, self.steps):
            if step == self.script.get("stop_in_step"):
                self.stop.wait()
            elif self.stop.is_set():
                return self.stopped(step)
            code = self.crash_before(step)
            if code is not None:
                return code
            time.sleep(self.script.get("step_s", 0.01))
            self.finish(step + 1)
        return self.export()

    def note_pid(self) -> None:
        if self.script.get("daemon"):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
        if self.script.get("grandchild"):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if "pid_file" in self.script:
            with Path(self.script["pid_file"]).open("a") as file:
                file.write(f"{os.getpid()} {self.workdir}\n")

    def resumed_step(self) -> int:
        if not self.spec["resume_from"]:
            return 0
        state = json.loads((self.workdir / self.spec["resume_from"] / "state.json").read_text())
        return int(state["step"])

    def finish(self, step: int) -> None:
        self.records.append(
            {"step": step, "loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0, "train_tokens": TOKENS_PER_STEP}
        )
        if step % self.every == 0 or step == self.steps:
            self.flush(step)
            self.checkpoint(step)

    def flush(self, step: int, *, partial: bool = False) -> None:
        if self.records:
            emit(
                "progress",
                start_step=self.range_start,
                end_step=step,
                train_tokens=TOKENS_PER_STEP * len(self.records),
                tokens_per_second=100.0,
                eta_s=1.0,
                steps=self.records,
                **({"partial": True} if partial else {}),
            )
        self.range_start, self.records = step, []

    def checkpoint(self, step: int) -> None:
        folder = self.workdir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        (folder / "weights.safetensors").write_bytes(bytes([step % 256]) * self.script.get("weights_bytes", 1000))
        files = files_in(folder)
        manifest = json.dumps({"step": step, "files": files})
        (folder / "manifest.json").write_text(manifest)
        if self.script.get("corrupt_checkpoint") == step:
            (folder / "weights.safetensors").write_bytes(b"!" * self.script.get("weights_bytes", 1000))
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        emit("checkpoint", step=step, path=str(folder), files=files, manifest_sha256=digest, asked=step == self.steps)

    def crash_before(self, step: int) -> int | None:
        # A script crashes an attempt that starts from nothing; the one that resumes goes through.
        if self.spec["resume_from"] and not self.script.get("crash_always"):
            return None
        script = self.script
        if script.get("kill_at_step") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.get("exit_at_step") == step:
            sys.stderr.write("the last words of a fake child\n")
            return 77
        if script.get("hang_at_step") == step:
            time.sleep(600)
        if script.get("garbage_at_step") == step:
            sys.stdout.write("this is no event\n")
            sys.stdout.flush()
            time.sleep(600)
        if script.get("stop_unasked_at_step") == step:
            return self.stopped(step)
        if script.get("out_of_memory_at_step") == step:
            emit("warning", code="OUT_OF_MEMORY_RETRIED", message=f"out of memory at step {step}")
        for kind, code in (("user", 2), ("platform", 3)):
            if script.get(f"fail_{kind}_at_step") == step:
                if kind == "user":
                    self.flush(step, partial=True)
                violations = [{"field": "learning_rate", "description": "lower it"}]
                reason = "TRAINING_INPUT_INVALID" if kind == "user" else "TRAINING_FAILED"
                details = {"cause": script["cause"]} if "cause" in script else {}
                emit(
                    "failed", kind=kind, reason=reason, message="as scripted", step=step, violations=violations,
                    details=details,
                )  # fmt: skip
                return code
        return None

    def stopped(self, step: int) -> int:
        self.flush(step, partial=True)
        emit("stopped", step=step, total_steps=self.steps)
        return 0

    def export(self) -> int:
        folder = self.workdir / "export"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"adapter" * 10)
        (folder / "adapter_config.json").write_text('{"r": 4}')
        files = files_in(folder)
        parity = {"max_abs_difference": 0.0}
        lineage = {"base_model": {"id": "tiny"}, "seed": 42, "train_sha256": "aa"}
        start = self.spec.get("start_from")
        if start is not None:
            held = {path.name: path.read_text() for path in (self.workdir / start["directory"]).iterdir()}
            lineage["started_from"] = {**start, "held": held}
        revision = revision_of(files)
        emit("exported", path=str(folder), files=files, revision=revision, parity=parity, lineage=lineage)
        emit("finished", total_steps=self.steps, revision=revision)
        return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--wait", action="store_true")
    arguments = parser.parse_args()
    run = FakeRun(arguments.workdir or await_work())
    signal.signal(signal.SIGTERM, lambda _number, _frame: run.stop.set())
    threading.Thread(target=exit_when_orphaned, daemon=True).start()
    return run.live()


if __name__ == "__main__":
    os._exit(main())
