"""README's benchmark table, from stored results: ``python -m benchmarks.table`` prints it, ``--write`` puts it into README.

Nothing here measures and nothing is typed by hand. A ratio is the median over a block's rounds of the quotient of two
turns of one round, so that what disturbs a round disturbs both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.peers.contest import CONTESTANTS, MODES
from benchmarks.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

PRODUCTS = {
    "PyTorch (MKL)": ("torch: matmul", "torch: matmul, transposed weights"),
    "PyTorch (oneDNN)": ("torch: oneDNN",),
    "NumPy (OpenBLAS)": ("numpy: OpenBLAS", "numpy: OpenBLAS, transposed weights"),
    "MLX on mlxsae's BLAS": ("ours: matmul",),
}
_TORCH_AND_NUMPY = {library: turns for library, turns in PRODUCTS.items() if "mlxsae" not in library}
HEADLINE = "trainer: step"


class Bar(NamedTuple):
    """A promise and what was measured."""

    what: str
    limit: float
    at_most: bool
    value: float | None

    @property
    def holds(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def load(path: Path | None = None) -> list[dict]:
    """The stored results of every machine, that of the fastest step of S1 first; or those of ``path``."""
    paths = RESULTS.glob("step-cpu-*.json") if path is None else [path]
    return sorted((json.loads(p.read_text()) for p in paths), key=_step_of_s1)


def _step_of_s1(results: dict) -> float:
    blocks = results["shapes"].get("S1", {}).get("blocks", {})
    return over_blocks(blocks, lambda b: median(b, HEADLINE)) or float("inf")


def load_captured(about: dict) -> dict | None:
    """What ``benchmarks.captured`` stored on the same machine, if anything."""
    path = RESULTS / f"captured-cpu-{machine.slug(about['cpu'])}.json"
    return json.loads(path.read_text()) if path.exists() else None


def median(block: dict, turn: str) -> float:
    return statistics.median(block["samples"][turn])


def quotient(block: dict, above: str, below: str) -> float:
    """Median over rounds of ``above / below``."""
    pairs = zip(block["samples"][above], block["samples"][below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def over_blocks(blocks: dict, value: Callable[[dict], float]) -> float | None:
    """Median over blocks: each is an independent contest of the same two."""
    return statistics.median(value(b) for b in blocks.values()) if blocks else None


def fastest_product(
    blocks: dict, libraries: dict[str, tuple[str, ...]] | None = None
) -> tuple[str, str] | None:
    """(library, turn) of the fastest float32 product, over all blocks."""
    taken = {}
    for library, turns in (PRODUCTS if libraries is None else libraries).items():
        for turn in turns:
            if (seconds := over_blocks(blocks, lambda b, t=turn: median(b, t))) is not None:
                taken[library, turn] = seconds
    return min(taken, key=taken.__getitem__) if taken else None


def update_bandwidth_share(block: dict, shape: Shape) -> float:
    """``48 d_sae d_in`` bytes (two weights with two moments each, read and written) over the update's time and the probe."""
    shares = [
        48 * shape.d_sae * shape.d_in / phases["update"] / (1e9 * probe)
        for phases, probe in zip(
            block["samples"]["ours: phases"], block["samples"]["probe: bandwidth"], strict=True
        )
    ]
    return statistics.median(shares)


def modes_bars(entry: dict, float32: dict[str, float | None], wider: bool) -> Iterator[Bar]:
    """The promises for certified low precision, BatchTopK and AVX2. A peer was timed beside the float32 step only: its ratio
    to the certified one is that ratio times float32 over certified, taken in the contest of our own ways.
    """
    block = entry["modes"]
    one = {"modes": block}
    best, mkl = (
        fastest_product(one, library) for library in (_TORCH_AND_NUMPY, {"MKL": PRODUCTS["PyTorch (MKL)"]})
    )
    assert best is not None
    assert mkl is not None
    step, certified = HEADLINE, "trainer-certified: step"
    yield Bar(
        "certified: step / PyTorch's float32 matmul alone", 0.36, True, quotient(block, certified, mkl[1])
    )
    encode = quotient(block, "ours-certified: encode", best[1])
    yield Bar("certified: encode with selection / fastest float32 matmul alone", 0.62, True, encode)
    gain = quotient(block, step, certified)
    for peer, limit in (
        ("sparsify", 7),
        ("SAELens float32", 22),
        ("SAELens bf16 autocast", 12),
        ("hand-tuned PyTorch", 2.8),
    ):
        ratio = float32.get(f"{peer} / step")
        yield Bar(f"certified: {peer} / step", limit, False, ratio and ratio * gain)
    plain = "ours-certified: step without the b_dec path"
    yield Bar(
        "certified: step with AuxK and b_dec path / without both",
        1.35,
        True,
        quotient(block, "ours-certified: step with AuxK", plain),
    )
    clipping = quotient(block, "ours-certified: step with clipping", "ours-certified: step")
    yield Bar("certified: step with exact clipping / without", 1.35, True, clipping)
    yield Bar("BatchTopK step / TopK step", 1.10, True, quotient(block, "trainer-batchtopk: step", step))
    yield Bar(
        "certified: BatchTopK step / TopK step",
        1.10,
        True,
        quotient(block, "trainer-batchtopk-certified: step", certified),
    )
    if wider:
        yield Bar("AVX2 step / AVX-512 step", 2.2, True, quotient(block, "trainer-avx2: step", step))


def bars(results: dict, name: str) -> list[Bar]:
    """The promises of a shape."""
    blocks, shape = results["shapes"][name]["blocks"], Shape(**results["shapes"][name]["shape"])
    mkl = fastest_product(blocks, {"PyTorch": PRODUCTS["PyTorch (MKL)"]})
    best = fastest_product(blocks)

    def peer_ratio(peer: str) -> float | None:
        return quotient(blocks[peer], f"{peer}: step", HEADLINE) if peer in blocks else None

    def ours(above: str, below: str) -> float | None:
        return over_blocks(blocks, lambda b: quotient(b, above, below))

    extra = over_blocks(blocks, lambda b: b["memory"].get("trainer", {}).get("extra", float("nan")))
    scaling = results.get("scaling")
    made = [
        Bar("step / PyTorch's float32 matmul alone", 0.50, True, mkl and ours(HEADLINE, mkl[1])),
        Bar(
            "encode with selection / fastest float32 matmul alone",
            1.00,
            True,
            best and ours("ours: encode", best[1]),
        ),
        Bar("sparsify / step", 5, False, peer_ratio("sparsify")),
        Bar("SAELens float32 / step", 16, False, peer_ratio("saelens")),
        Bar("SAELens bf16 autocast / step", 8, False, peer_ratio("saelens-bf16")),
        Bar("hand-tuned PyTorch / step", 2, False, peer_ratio("best-torch")),
        Bar(
            "update: 48 d_sae d_in bytes / time / probe's bandwidth",
            0.80,
            False,
            over_blocks(blocks, lambda b: update_bandwidth_share(b, shape)),
        ),
        Bar(
            "step with AuxK and b_dec path / without both",
            1.25,
            True,
            ours("ours: step with AuxK", "ours: step without the b_dec path"),
        ),
        Bar("step with exact clipping / without", 1.25, True, ours("ours: step with clipping", "ours: step")),
        Bar(
            "peak memory beyond parameters, moments, batch / allowed",
            1.0,
            True,
            extra and extra / shape.extra_bytes_allowed,
        ),
    ]
    if scaling and name == "S1":
        ratio = statistics.median(
            b / (4 * a) for a, b in zip(scaling["samples"]["S1"], scaling["samples"]["S1x4"], strict=True)
        )
        made.append(Bar("step of 4,096 tokens / 4 steps of 1,024", 1.0, True, ratio))
    if "large" in results and name == "S1":
        made.append(
            Bar("S3: step / its floor", 1.3, True, quotient(results["large"], "step", "OpenBLAS, in parts"))
        )
    entry = results["shapes"][name]
    if "modes" in entry:
        wider = "avx512" in results["machine"].get("kernels", "avx512")
        made += modes_bars(entry, {bar.what: bar.value for bar in made}, wider)
    return made


def rows(results: dict, name: str) -> Iterator[list[str]]:
    """One row a contestant: ours first, then as measured, slowest last."""
    blocks = results["shapes"][name]["blocks"]
    gates = results["gate"]["peers"]
    best = fastest_product(blocks)
    floor = over_blocks(blocks, lambda b: median(b, best[1])) if best else None
    step = over_blocks(blocks, lambda b: median(b, HEADLINE))
    if step is None or floor is None:
        return
    extra = statistics.median(b["memory"]["trainer"]["extra"] for b in blocks.values())
    yield ["**mlxsae**", ms(step), f"{step / floor:.2f}", "1", mebibytes(extra), *gate(gates, "trainer")]
    modes = results["shapes"][name].get("modes")
    kernels = results["machine"].get("kernels", "avx512")
    for mode in () if modes is None else MODES:
        if mode == "trainer-avx2" and "avx512" not in kernels:
            continue  # it is the row above
        if mode.startswith("trainer-"):
            turn = f"{mode}: step"
            # Beside the float32 step of the same contest, and scaled to the time of the row above.
            part = quotient(modes, turn, HEADLINE)
            extra = modes["memory"].get(mode, {}).get("extra")
            yield [
                CONTESTANTS[mode].title,
                ms(step * part),
                f"{step * part / floor:.2f}",
                f"{part:.2f}",
                "" if extra is None else mebibytes(extra),
                *gate(gates, mode),
            ]
    for peer in sorted(blocks, key=lambda p: quotient(blocks[p], f"{p}: step", HEADLINE)):
        block, turn = blocks[peer], f"{peer}: step"
        yield [
            CONTESTANTS[peer].title,
            ms(median(block, turn)),
            f"{quotient(block, turn, best[1]):.2f}" if best else "",
            f"{quotient(block, turn, HEADLINE):.1f}",
            mebibytes(block["memory"][peer]["extra"]),
            *gate(gates, peer),
        ]


def gate(gates: dict, peer: str) -> list[str]:
    seen = gates.get(peer)
    if seen is None:
        return ["", ""]
    selection = seen["selection"]
    exact = "another rule" if selection is None else "yes" if selection["wrong_rows"] == 0 else "no"
    return [exact, "yes" if seen["deterministic"] else "no"]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(machines: list[dict]) -> str:
    """The whole block between README's markers."""
    return "\n\n".join(
        [render_machine(results) for results in machines]
        + [
            "All steps start from the same weights and were checked to compute the same loss, but for BatchTopK's; activations "
            "are fresh Gaussian ones; ratios compare turns of one round. Memory is what a step takes beyond parameters, two "
            "moments and the batch. `make bench-peers` repeats it."
        ]
    )


def render_machine(results: dict) -> str:
    about = results["machine"]
    kernels = f", {about['kernels'].removeprefix('kernel (').rstrip(')')}" if "kernels" in about else ""
    parts = [f"### {about['cpu']}, {about['threads']} threads{kernels}"]
    versions: dict[str, str] = {}
    for name in sorted(results["shapes"]):
        entry = results["shapes"][name]
        if not entry["blocks"]:
            continue
        shape = Shape(**entry["shape"])
        for block in entry["blocks"].values():
            versions |= block["versions"]
        best = fastest_product(entry["blocks"])
        assert best is not None
        floor = over_blocks(entry["blocks"], lambda b, t=best[1]: median(b, t))
        assert floor is not None
        rounds = sorted({b["rounds"] for b in entry["blocks"].values()})
        parts.append(
            f"**{name}**: n = {shape.n:,}, d_in = {shape.d_in:,}, d_sae = {shape.d_sae:,}, k = {shape.k}; floor: the product "
            f"`x @ W_enc` alone by {best[0]}, {ms(floor)}; medians of {' or '.join(map(str, rounds))} rounds.\n\n"
            + markdown(
                [
                    "training step",
                    "time",
                    "times the floor",
                    "times ours",
                    "memory",
                    "exact top-k",
                    "repeatable",
                ],
                list(rows(results, name)),
            )
        )
    if (large := results.get("large")) is not None:
        parts.append(render_large(large))
    if (captured := load_captured(about)) is not None:
        parts.append(render_captured(captured))
    listed = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    parts.append(f"{about['date'][:10]}; {listed}.")
    return "\n\n".join(parts)


def render_large(block: dict) -> str:
    """The step of a shape that fills the machine, beside the product over the same weights in the same process."""
    shape = Shape(**block["shape"])
    memory = block["memory"]
    peak = f", {memory['peak'] / 2**30:.1f} GiB resident at most" if memory else ""
    return (
        f"**S3**: n = {shape.n:,}, d_in = {shape.d_in:,}, d_sae = {shape.d_sae:,}, k = {shape.k}: a step of the trainer takes "
        f"{median(block, 'step'):.1f} s, the product alone by NumPy (OpenBLAS) {median(block, 'OpenBLAS, in parts'):.1f} s "
        f"({quotient(block, 'step', 'OpenBLAS, in parts'):.2f} times the floor){peak}; medians of {block['rounds']} rounds "
        "(`python -m benchmarks.peers.run --large`)."
    )


def render_captured(found: dict) -> str:
    """The step on a language model's activations, from ``benchmarks.captured``."""
    header = ["activations", "step", "certified", "encode", "certified", "screened", "rescored"]
    body = []
    for name, stage in found["stages"].items():
        times = [
            ms(statistics.median(stage["samples"][f"{precision}: {what}"]))
            for what in ("step", "encode")
            for precision in ("float32", "certified")
        ]
        counts = stage["candidates"]
        body.append([name, *times, f"{counts['screened']:.1f}", f"{counts['rescored']:.1f}"])
    return (
        "The step of S1 on what a language model has at eight sites, at the start and along a training run, beside Gaussian "
        f"activations; of a token's features, how many the screen in 16 bits leaves and how many of these are computed again in "
        f"float32, for k = {found['shape']['k']} (`python -m benchmarks.captured`).\n\n"
        + markdown(header, body)
    )


def readme_block(text: str) -> str | None:
    """What stands between README's markers."""
    if BEGIN not in text or END not in text:
        return None
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip()


def report(results: dict) -> str:
    """The promises, with what was measured."""
    lines: list[Any] = []
    for name in sorted(results["shapes"]):
        if not results["shapes"][name]["blocks"]:
            continue
        body = []
        for bar in bars(results, name):
            verdict = {None: "not measured", True: "holds", False: "falls short"}[bar.holds]
            value = "" if bar.value is None else f"{bar.value:.3f}"
            body.append([bar.what, f"at {'most' if bar.at_most else 'least'} {bar.limit:g}", value, verdict])
        lines.append(f"{name}\n\n" + markdown(["what", "promise", "measured", ""], body))
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="default: all that are stored")
    parser.add_argument("--write", action="store_true", help="write the table between README's markers")
    parser.add_argument("--bars", action="store_true", help="print the promises instead")
    arguments = parser.parse_args()
    machines = load(arguments.results)
    if not machines:
        sys.exit("no results are stored: make bench-peers")
    if arguments.bars:
        for results in machines:
            print(f"# {results['machine']['cpu']}\n\n{report(results)}\n")
        return
    table = render(machines)
    if not arguments.write:
        print(table)
        return
    text = README.read_text()
    if readme_block(text) is None:
        sys.exit(f"README.md has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
