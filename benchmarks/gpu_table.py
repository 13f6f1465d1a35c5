"""The table that ``benchmarks/gpu.py`` prints: a line for each part, and its results below."""

from collections.abc import Iterator
from typing import Any


def table(result: dict[str, Any]) -> list[str]:
    """Lines that summarise a record."""
    lines = [f"{result['environment'].get('GPUs', '')}; torch {result['environment'].get('torch', '')}"]
    for part in result["parts"]:
        seconds = f"{part['seconds']:.0f} s" if "seconds" in part else ""
        reason = f": {part['reason']}" if "reason" in part else ""
        lines.append(f"{part['name']:20}{part['status']:>10}{seconds:>8}  {part['what']}{reason}")
        lines += [f"    {line}" for line in details(part.get("result", {}))]
        lines += [f"    | {line}" for line in part.get("last_lines", [])[-5:]]
    return lines


def details(result: dict[str, Any]) -> Iterator[str]:
    """Lines for the result of a part of any kind."""
    if "tests" in result:
        yield f"{result['passed']} of {result['tests']} tests passed, {len(result['skipped'])} were skipped"
        yield from (f"failed: {name}: {reason[:120]}" for name, reason in result["failed"].items())
    for case in result.get("cases", ()):
        yield from sampling(case)
    for name in ("eager", "compiled", "ours"):
        if name in result:
            yield step(name, result[name])
    if "in_turns" in result:
        yield f"plain / ours, in turns: {quartiles(result['in_turns']['plain / ours'])}"


def sampling(case: dict[str, Any]) -> Iterator[str]:
    """A line for each side of a case: rate, time of a step, memory, and its time over ours."""
    for name, side in case.items():
        if not isinstance(side, dict) or "ms_a_step" not in side:
            continue
        memory = f"{side['gib']:8.2f} GiB" if "gib" in side else ""
        ratio = case.get("ratios", {}).get(name)
        against = f"   × {quartiles(ratio)}, {side['repeats']} turns" if ratio else ""
        head = f"{case['size']:5}batch {case['batch']:<4}{name:24}"
        passes = f"{side['passes']:6} passes of {side['ms_a_pass']:.3f} ms" if "passes" in side else ""
        yield f"{head}{side['images_s']:10.2f} images/s{side['ms_a_step']:10.3f} ms/token{passes}{memory}{against}"
    yield from (f"{name} failed: {reason[:120]}" for name, reason in case.get("failed", {}).items())


def step(name: str, record: dict[str, Any]) -> str:
    """A line for a training step."""
    parts = [f"{record['median'] * 1e3:.1f} ms ({record['q1'] * 1e3:.1f}, {record['q3'] * 1e3:.1f})"]
    parts.append(f"{record['images_s']:.1f} images/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "peak_gib" in record:
        parts.append(f"{record['peak_gib']:.2f} GiB")
    parts.append(f"loss {record['loss_first']:g} → {record['loss_last']:g}")
    if "scale_last" in record:
        parts.append(f"scale {record['scale_last']:g}, {record['skipped_steps']} steps skipped")
    return f"{name:10}{', '.join(parts)}" + (f"; {record['fault']}" if record["fault"] else "")


def quartiles(spread: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{spread['median']:.2f} ({spread['q1']:.2f}, {spread['q3']:.2f})"
