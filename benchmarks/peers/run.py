"""Contests: ours, the floors and one peer take turns (A B C A B C ...), each in its own process, on the same data.

``python -m benchmarks.peers.run --shape S1`` measures every peer and stores what it saw in ``benchmarks/results``; what it
means is worked out from there by ``benchmarks.table``. Every block is written when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.peers.contest import CONTESTANTS, LARGE, MODES, OURS, PEERS
from benchmarks.shapes import SHAPES, Shape, batch
from mlxsae import ops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GATE_SHAPE = "S0"
LOSS_TOLERANCE = 1e-5
LOSS_TOLERANCE_BF16 = 1e-2
PAUSE = 0.06
"""Seconds between turns: the idle threads of OpenBLAS and OpenMP spin for tens of milliseconds before they sleep."""


DISTURBED = 0.03
"""Part of a call for which its threads may wait for a core before it counts as disturbed by others."""


class Player:
    """A worker process, spoken to in JSON lines."""

    def __init__(self, name: str, shape: str, threads: int):
        peer = CONTESTANTS[name]
        environment = {k: v for k, v in os.environ.items() if k not in machine.FORCED}
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MLXSAE_NUM_THREADS"):
            environment[variable] = str(threads)
        environment |= peer.env
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", name, shape, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __call__(self, do: str, **arguments: Any) -> dict:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"[run] worker {self.name} must answer to {do} but ended; its error is above.")
        return json.loads(answer)

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def player(name: str, shape: str, threads: int) -> Iterator[Player]:
    p = Player(name, shape, threads)
    try:
        yield p
    finally:
        p.end()


def others_busy(seconds: float = 1.0) -> float:
    """Cores that somebody else uses, on average over a moment in which this contest does nothing."""

    def busy() -> tuple[int, int]:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    try:
        before = busy()
        time.sleep(seconds)
        after = busy()
    except OSError:
        return 0.0
    return machine.cores() * (after[0] - before[0]) / max(after[1] - before[1], 1)


def wait_until_quiet(limit: float | None) -> float:
    """Other people's load, in cores, when the machine was quiet enough to begin (at once where ``limit`` is None)."""
    while (load := others_busy()) > (limit if limit is not None else float("inf")):
        time.sleep(4)
    return load


def mse_of(loss: float, kind: str, x: np.ndarray) -> float:
    """A peer's loss in the terms of ours: squared error summed over coordinates, averaged over tokens."""
    if kind == "fvu":
        return loss * float(np.square(x - x.mean(axis=0), dtype=np.float64).sum()) / len(x)
    return loss


TURNS: tuple[tuple[str, str], ...] = (
    ("trainer", "step"),
    ("ours", "step"),
    ("ours", "step without the b_dec path"),
    ("ours", "step with clipping"),
    ("ours", "step with AuxK"),
    ("ours", "encode"),
    ("ours", "phases"),
    ("ours", "matmul"),
    ("torch", "matmul"),
    ("torch", "matmul, transposed weights"),
    ("torch", "oneDNN"),
    ("numpy", "OpenBLAS"),
    ("numpy", "OpenBLAS, transposed weights"),
    ("probe", "bandwidth"),
)


def block(shape: str, peer: str, *, threads: int, rounds: int, quiet: float | None, patience: int) -> dict:
    """One peer beside ours and all floors: every sample, in seconds, in the order of rounds."""
    with ExitStack() as stack:
        turns = (*TURNS, (peer, "step"))
        names = dict.fromkeys(who for who, _ in turns)
        players = {name: stack.enter_context(player(name, shape, threads)) for name in names}
        made = {name: p("make") for name, p in players.items()}
        first = {name: players[name]("run", what="step", index=0)["loss"] for name in (*OURS, peer)}
        agreement = {name: compare_losses(name, first, SHAPES[shape]) for name in ("trainer", peer)}
        samples: dict[str, list] = {f"{who}: {what}": [] for who, what in turns}
        waited: dict[str, list[float]] = {f"{who}: {what}": [] for who, what in turns}
        for who, what in turns:
            turn(players[who], what, 1)  # warm-up
        memory = {name: players[name]("memory") for name in (*OURS, peer) if made[name]["can_reset_peak"]}
        busy = wait_until_quiet(quiet)
        load = [round(v, 2) for v in os.getloadavg()]
        for index in range(2, 2 + rounds):
            for who, what in turns:
                value, part = turn(players[who], what, index, patience)
                samples[f"{who}: {what}"].append(value)
                waited[f"{who}: {what}"].append(part)
        return {
            "peer": peer,
            "rounds": rounds,
            "loss": agreement,
            "versions": {k: v for m in made.values() for k, v in m["versions"].items()},
            "others_busy_cores": round(busy, 3),
            "load_average": load,
            "date": machine.describe(threads)["date"],
            "samples": samples,
            "waited": waited,
            "memory": memory,
        }


def modes_block(shape: str, *, threads: int, rounds: int, quiet: float | None, patience: int) -> dict:
    """Our step in all its ways, beside the products: every sample, in seconds."""
    turns = [("trainer", "step"), *((name, "step") for name in MODES)]
    turns += [
        ("ours-certified", what)
        for what in ("step without the b_dec path", "step with clipping", "step with AuxK")
    ]
    turns += [("ours-certified", "encode"), *((w, what) for w, what in TURNS if w in ("torch", "numpy"))]
    with ExitStack() as stack:
        names = dict.fromkeys(who for who, _ in turns)
        players = {name: stack.enter_context(player(name, shape, threads)) for name in names}
        made = {name: p("make") for name, p in players.items()}
        samples: dict[str, list] = {f"{who}: {what}": [] for who, what in turns}
        for who, what in turns:
            turn(players[who], what, 0)
            turn(players[who], what, 1)
        busy = wait_until_quiet(quiet)
        memory = {name: players[name]("memory") for name in MODES if made[name]["can_reset_peak"]}
        for index in range(2, 2 + rounds):
            for who, what in turns:
                samples[f"{who}: {what}"].append(turn(players[who], what, index, patience)[0])
        return {
            "rounds": rounds,
            "others_busy_cores": round(busy, 3),
            "date": machine.describe(threads)["date"],
            "samples": samples,
            "memory": memory,
        }


def turn(who: Player, what: str, index: int, patience: int = 0) -> tuple[Any, float]:
    """One timed call, and what part of it its threads waited for a core.

    A call that others disturbed (``DISTURBED``) is made again, up to ``patience`` times; the least disturbed one counts.
    """
    best: tuple[Any, float] = (None, float("inf"))
    for attempt in range(1 + patience):
        time.sleep(PAUSE)
        if what == "phases":
            answer = who("phases", index=index)
        elif what == "bandwidth":
            answer = who("bandwidth")
        else:
            answer = who("run", what=what, index=index + 1000 * attempt)
        if answer["waited"] < best[1]:
            best = rounded(answer["value"]), round(answer["waited"], 4)
        if best[1] <= DISTURBED:
            break
    return best


def rounded(value: float | dict[str, float]) -> float | dict[str, float]:
    return {k: round(v, 6) for k, v in value.items()} if isinstance(value, dict) else round(value, 6)


def compare_losses(peer: str, losses: dict[str, float], shape: Shape) -> dict:
    """The first step's losses; raises where the peer does not compute what we compute."""
    kind = CONTESTANTS[peer].loss
    if kind not in ("mse", "fvu"):
        return {"ours": losses["ours"], "peer": losses[peer], "compared": False}
    theirs = mse_of(losses[peer], kind, batch(shape, 0))
    error = abs(theirs - losses["ours"]) / losses["ours"]
    allowed = LOSS_TOLERANCE if CONTESTANTS[peer].exact_by_design else LOSS_TOLERANCE_BF16
    if not error <= allowed:
        raise ValueError(
            f"[run] {peer} must have our loss {losses['ours']} within {allowed} but got {theirs}."
        )
    return {"ours": losses["ours"], "peer": theirs, "relative_error": error, "compared": True}


def scaling_block(threads: int, rounds: int, quiet: float | None, patience: int) -> dict:
    """Four times the tokens, everything else as S1: the two steps in turns."""
    with player("trainer", "S1", threads) as small, player("trainer", "S1x4", threads) as large:
        for p in (small, large):
            p("make")
            for index in range(2):
                p("run", what="step", index=index)
        busy = wait_until_quiet(quiet)
        samples: dict[str, list[float]] = {"S1": [], "S1x4": []}
        waited: dict[str, list[float]] = {"S1": [], "S1x4": []}
        for index in range(2, 2 + rounds):
            for name, p in (("S1", small), ("S1x4", large)):
                value, part = turn(p, "step", index, patience)
                samples[name].append(value)
                waited[name].append(part)
        return {"rounds": rounds, "others_busy_cores": round(busy, 3), "samples": samples, "waited": waited}


def large_block(shape: str, threads: int, rounds: int, quiet: float | None, patience: int) -> dict:
    """A shape that leaves no memory for a second process: the step and the product alone take turns in one."""
    turns = ("step", "OpenBLAS, in parts")
    with player(LARGE, shape, threads) as p:
        made = p("make")
        p("run", what="step", index=0)
        made["can_reset_peak"] = p("reset")["can_reset_peak"]  # what was made of the weights is gone
        p("run", what="step", index=1)
        memory = p("memory") if made["can_reset_peak"] else {}
        busy = wait_until_quiet(quiet)
        samples: dict[str, list[float]] = {what: [] for what in turns}
        waited: dict[str, list[float]] = {what: [] for what in turns}
        for index in range(2, 2 + rounds):
            for what in turns:
                value, part = turn(p, what, index, patience)
                samples[what].append(value)
                waited[what].append(part)
    return {
        "shape": SHAPES[shape]._asdict(),
        "rounds": rounds,
        "others_busy_cores": round(busy, 3),
        "date": machine.describe(threads)["date"],
        "versions": made["versions"],
        "samples": samples,
        "waited": waited,
        "memory": memory,
    }


def gate(peer: str, threads: int) -> dict:
    """At a small shape: is the selection that of exact float32 top-k, and do two runs give the same bits?"""
    with player(peer, GATE_SHAPE, threads) as p:
        selection = None if CONTESTANTS[peer].loss == "mse of BatchTopK" else p("selection")
        digests = {p("digest", steps=3)["digest"] for _ in range(2)}
    with player(peer, GATE_SHAPE, threads) as p:
        digests.add(p("digest", steps=3)["digest"])
    return {"selection": selection, "deterministic": len(digests) == 1}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S1", choices=sorted(SHAPES))
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument(
        "--quiet", type=float, default=None, help="begin a block only below so many busy cores"
    )
    parser.add_argument(
        "--patience", type=int, default=3, help="times to repeat a call that others disturbed"
    )
    parser.add_argument("--no-gate", action="store_true", help="keep stored exactness and determinism")
    parser.add_argument("--modes", action="store_true", help="also our step in its other ways")
    parser.add_argument("--scaling", action="store_true", help="also S1 with 4096 tokens against 1024")
    parser.add_argument(
        "--large", action="store_true", help="also S3, which takes 18 GB and minutes, against its product"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"step-cpu-{machine.slug(machine.cpu_name())}.json"
    )
    arguments = parser.parse_args()
    forced = [name for name in machine.FORCED if name in os.environ]
    if forced:
        print(f"unset for the workers: {', '.join(forced)}", file=sys.stderr)

    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    kernels = ops.backends()["topk_encode"]["cpu"]
    results["machine"] = machine.describe(arguments.threads) | {"kernels": kernels}
    shapes = results.setdefault("shapes", {})
    here = shapes.setdefault(arguments.shape, {"shape": SHAPES[arguments.shape]._asdict(), "blocks": {}})
    gates = results.setdefault("gate", {"shape": GATE_SHAPE, "peers": {}})["peers"]
    if arguments.scaling:
        results["scaling"] = scaling_block(
            arguments.threads, arguments.rounds, arguments.quiet, arguments.patience
        )
        write(arguments.out, results)
    if arguments.large:
        results["large"] = large_block(
            "S3", arguments.threads, min(arguments.rounds, 3), arguments.quiet, min(arguments.patience, 1)
        )
        write(arguments.out, results)
    if arguments.modes:
        for name in MODES if not arguments.no_gate else ():
            if name.startswith("trainer-"):
                gates[name] = gate(name, arguments.threads)
        here["modes"] = modes_block(
            arguments.shape,
            threads=arguments.threads,
            rounds=arguments.rounds,
            quiet=arguments.quiet,
            patience=arguments.patience,
        )
        write(arguments.out, results)
    peers = [name for name in arguments.peers.split(",") if name]
    if not arguments.no_gate:
        for name in ("trainer", *peers):
            gates[name] = gate(name, arguments.threads)
            write(arguments.out, results)
    for name in peers:
        done = block(
            arguments.shape,
            name,
            threads=arguments.threads,
            rounds=arguments.rounds,
            quiet=arguments.quiet,
            patience=arguments.patience,
        )
        here["blocks"][name] = done
        write(arguments.out, results)
        ours = statistics.median(done["samples"]["trainer: step"])
        theirs = statistics.median(done["samples"][f"{name}: step"])
        print(
            f"{name}: {theirs * 1e3:.1f} ms, ours {ours * 1e3:.1f} ms, ratio {theirs / ours:.2f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
