"""What the compiler makes of each norm: its loops (kernels on a GPU), and how often they write and read x.

    python benchmarks/fusions.py [--mb 256] [--hlo DIR]

From the compiled HLO of this machine's default device. A stream is the size of x once: `written` counts the results of
all loops, `read` their operands whole, each in units of x's bytes; `limit` is what a norm cannot but move (see
jaxnorm/lab/bench/timing.py). Small results (statistics, scale, bias) count for what they are, next to nothing. The
table is printed, and JSON where --json says.
"""

import argparse
import json
import re
from pathlib import Path

import jax

import jaxnorm
from jaxnorm.lab.bench import cases, peers, timing

# An instruction of the entry computation: its name, its type, the operation, its operands.
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)")
SHAPE = re.compile(r"\b(pred|[su]\d+|bf16|f\d+|c\d+)\[([\d,]*)\]")
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "opt-barrier", "after-all"}


def size(text: str) -> int:
    """The bytes of every array in a type."""
    total = 0
    for dtype, dims in SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        count = 1
        for n in filter(None, dims.split(",")):
            count *= int(n)
        total += count * bits // 8
    return total


def loops(hlo: str) -> list[dict]:
    """The instructions of the entry computation that do something, with the bytes they write and read."""
    entry = hlo[hlo.index("\nENTRY ") :].split("\n")[2:]
    sizes: dict[str, int] = {}
    found = []
    for line in entry:
        if not (match := LINE.match(line)):
            continue
        name, kind, operation, operands = match.groups()
        sizes[name] = size(kind)
        if operation not in FREE:
            read = sum(sizes.get(operand, 0) for operand in set(re.findall(r"%([\w.-]+)", operands)))
            found.append({"name": name, "operation": operation, "written": sizes[name], "read": read})
    return found


def measure(norm: str, dtype: str, shape: tuple[int, ...], way: str, peer: str, keep: Path | None) -> dict:
    x, scale, bias, g = (jax.ShapeDtypeStruct(s, d) for s, d in zip((shape, shape[-1:], shape[-1:], shape),
                         (dtype, "float32", "float32", dtype), strict=True))  # fmt: skip
    f = peers.BUILD[peer](norm, shape, dtype)

    def backward(x, scale, bias, g):
        y, pull, state = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, state, pull(g)

    lowered = jax.jit(f).lower(x, scale, bias) if way == "forward" else jax.jit(backward).lower(x, scale, bias, g)
    compiled = lowered.compile()
    hlo = compiled.as_text()
    if keep:
        (keep / f"{peer}-{norm}-{dtype}-{'x'.join(map(str, shape))}-{way}.hlo").write_text(hlo)
    one = size(f"{ {'float32': 'f32', 'bfloat16': 'bf16'}[dtype] }[{','.join(map(str, shape))}]")
    found = loops(hlo)
    return {
        "norm": norm, "dtype": dtype, "shape": shape, "way": way, "peer": peer, "loops": len(found),
        "large": sum(loop["written"] + loop["read"] > one / 8 for loop in found),
        "written": sum(loop["written"] for loop in found) / one,
        "read": sum(loop["read"] for loop in found) / one,
        "limit": timing.STREAMS[norm][way], "temporary": compiled.memory_analysis().temp_size_in_bytes / one,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=16, help="megabytes of x in float32 (default: 16)")
    parser.add_argument("--peers", default="jaxnorm,flax.linen", help="of " + ",".join(set(peers.BUILD) - {"torch"}))
    parser.add_argument("--hlo", type=Path, help="a folder for the HLO itself")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, jaxnorm {jaxnorm.__version__}")
    print(f"{'norm':9}{'dtype':10}{'shape':22}{'way':10}{'peer':12} loops large written   read  limit  temporary")
    rows = []
    for norm, shapes in cases.SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            for shape in shapes:
                for way in timing.WAYS:
                    for peer in args.peers.split(","):
                        r = measure(norm, dtype, cases.scaled(shape, args.mb), way, peer, args.hlo)
                        rows.append(r)
                        print(
                            f"{norm:9}{dtype:10}{'x'.join(map(str, r['shape'])):22}{way:10}{peer:12}{r['loops']:6}"
                            f"{r['large']:6}{r['written']:8.2f}{r['read']:7.2f}{r['limit']:7}{r['temporary']:11.2f}"
                        )
    if args.json:
        args.json.write_text(json.dumps({"chip": device.device_kind, "jax": jax.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
