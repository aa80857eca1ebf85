"""The suites of `splitray bench` as tables, read from their documents."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = {
    "tpot_ms": ".1f", "ratio": ".2f", "bound_ms": ".1f", "cpu_ms_per_token": ".1f", "exchanges_per_token": "d",
    "bytes_per_token": ",.0f", "wire_over_payload": ".3f",
}  # fmt: skip


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["model"]
    yield row["name"]
    for key, form in _COLUMNS.items():
        yield format(row[key], form) if key in row else ""


def engine_table(console: Console, result: dict[str, Any]) -> None:
    """Decode of each placement, the ratios and the exchange."""
    heads = ("model", "placement", "ms/token", "speed", "bound ms", "CPU ms", "exchanges", "bytes/token", "wire")
    table = Table(*heads, title="decode against one-thread transformers", box=None)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for name, value in result["ratios"].items():
        console.print(f"{name:24} {value:.3f}")
    exchange = result["exchange_us"]
    console.print(f"exchange                 {exchange['median']:.0f} us median, {exchange['p95']:.0f} us p95")
    console.print(
        f"  inside the engine      {exchange['split_half']:.0f} us in halves, {exchange['layer_cut']:.0f} us at one cut"
    )


def predicted_table(console: Console, result: dict[str, Any]) -> None:
    """Each placement as predicted and as measured, and the errors."""
    for weights, found in result["formats"].items():
        title = f"{result['model']}, {weights} weights, two processes: predicted and measured tpot"
        table = Table("placement", title=title, box=None)
        for name in ("exchanges", "predicted ms", "measured ms", "error"):
            table.add_column(name, justify="right")
        for r in found["rows"]:
            table.add_row(r["name"], f"{r['exchanges_per_token']}", f"{r['predicted_ms']:.2f}",
                          f"{r['measured_ms']:.2f}", f"{r['error']:+.1%}")  # fmt: skip
        console.print(table)
        console.print(f"median error             {found['median_error']:.1%}")
        console.print(f"worst error              {found['worst_error']:.1%}")


def faults_table(console: Console, result: dict[str, Any]) -> None:
    """Whether tokens stayed the same, and what faults, moves and checkpoints cost."""

    def line(name: str, spread: dict[str, float], form: str = ".3f") -> None:
        console.print(f"  {name:44} {spread['median']:{form}} median, {spread['max']:{form}} at most")

    console.print(f"{result['trials']} faults in threads, {result['struck']} that struck: {result['identical']} with "
                  f"the same tokens, {result['hangs']} hangs, {result['leaks']} leaks")  # fmt: skip
    line("recovery, s", result["recovery_s"])
    killed, standing, moved = (result[k] for k in ("killed_processes", "standing_by", "migration"))
    console.print(f"{killed['trials']} processes killed and started anew: {killed['identical']} with the same tokens")
    line("start of a process, s", killed["restart_s"])
    line("gap between two tokens beyond that, s", killed["beyond_restart_s"])
    console.print(f"{standing['trials']} processes killed, another one standing by: {standing['identical']} the same")
    line("gap between two tokens, s", standing["gap_s"])
    line("the same in decode steps", standing["gap_steps"], ".1f")
    console.print(f"half of all heads moved {moved['rounds']} times at a context of 512 tokens")
    line("extra gap, decode steps", moved["extra_steps"], ".1f")
    console.print(
        f"  bytes off the formula {moved['bytes_error']}, delay off by {moved['delay_error_median']:.0%} (median): "
        "here the copy takes the processes' time and not the link's; tests/netlab predicts it for a shaped link"
    )
    lost = result["checkpoint_cost"]["lost_share"]
    console.print("checkpoints cost " + ", ".join(f"{v:.1%} of tokens/s ({k})" for k, v in lost.items()))


def simulator_table(console: Console, result: dict[str, Any]) -> None:
    """Rates of the virtual clock, and what deciding costs."""
    for instances, rate in result["slots_per_s"].items():
        console.print(f"{rate:,.0f} slots a second, 32 layers on two devices, {instances} side by side")
    for r in result["many_devices"]:
        console.print(
            f"{r['devices']} devices, {r['tokens']:,} tokens: {r['seconds']:.0f} s; {r['decisions']:,} decisions of "
            f"{r['decision_s'] * 1e3:.1f} ms, {r['decision_share_of_token']:.1%} of a token, {r['moves']:,} moves"
        )


def weights_table(console: Console, result: dict[str, Any]) -> None:
    """Each format of each model, then what is aimed at beside what came of it."""
    heads = ("model", "weights", "one device ms", "split half ms", "one cut ms", "CPU ms", "prompt tokens/s", "split",
             "resident MB", "over share")  # fmt: skip
    table = Table(*heads, title="time of a token, of a prompt, and memory of one device, by format", box=None)
    for model, rows in result["models"].items():
        for kind, r in rows.items():
            cells = [f"{r[f'{p}_tpot_ms']:.1f}" for p in ("one_device", "split_half", "layer_cut")]
            cells += [f"{r['one_device_cpu_ms_per_token']:.1f}", f"{r['prefill_tokens_per_s']:.0f}"]
            cells += [
                f"{r['split_half_prefill_tokens_per_s']:.0f}",
                f"{r['one_device_memory']['rss_bytes'] / 1e6:,.0f}",
            ]
            table.add_row(model, kind, *cells, f"{r['rss_over_share']:.2f}")
    console.print(table)
    aims = Table("model", "weights", "what", "measured", "aim", "", title="what is aimed at", box=None)
    for a in result["aims"]:
        aims.add_row(a["model"], a["format"], a["what"], f"{a['measured']:.4g}", f"{a['aim']:.4g}",
                     "" if a["reached"] else "missed")  # fmt: skip
    console.print(aims)
    for model, r in result["small_devices"].items():
        console.print(f"{model} on three devices of {r['memory_bytes'] / 1e6:.0f} MB:")
        for kind in ("float32", "int4/128"):
            told = r[kind].get("refused") or f"{r[kind]['tokens']} tokens"
            console.print(f"  {kind}: {told}")
