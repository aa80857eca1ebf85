"""`splitray perplexity`: how well a model predicts a text, whole or split, exact or lossy."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from splitray.commands import options
from splitray.errors import InputError
from splitray.model.folder import check_folder
from splitray.report.progress import bar, progress
from splitray.report.stdout import print_json, stdout_kept
from splitray.results import result_file, try_file


def perplexity(
    model: options.Model,
    text: Annotated[str, typer.Option(help="A UTF-8 file to score.", metavar="FILE")],
    cut: Annotated[
        str | None,
        typer.Option(help="Two devices, the first P layers on one; with --out several, or all.", metavar="P"),
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(help="Placement file (YAML) instead of a cut; with --out several.", metavar="FILE"),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="How what crosses is coded: none, bf16, int8, int4; with --out several.", metavar="NAME"),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            help="none, loss:P, awgn:DB, sigma:S or nakagami:M,OMEGA,HTH; behind commas unit=token or packet:BYTES, "
            "burst=UNITS, fill=last or mean, rescale, snr=DB, sigma=S, equalise. With --out several, also as "
            "loss:0.1/0.2.",
            metavar="CHANNEL",
        ),
    ] = None,
    masks: Annotated[int, typer.Option(help="Draws of the losses that are averaged.", min=1, metavar="N")] = 5,
    tokens: Annotated[int | None, typer.Option(help="Only the text's first tokens.", min=2, metavar="N")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window (the context).", metavar="N")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between two (half of it).", metavar="N")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A sweep over all that is given, into a table to go on with.", metavar="FILE")
    ] = None,
    dtype: options.Dtype = "float32",
    weights: options.PlanWeights = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Score a text with a model, whole or split, exact, through codecs and over noisy channels."""
    if out is not None and weights is not None:
        raise InputError("weights", expected="one measurement", actual="a sweep (--out)",
                         remedy="leave --out out: the table of a sweep is about what crosses")  # fmt: skip
    if out is not None:
        try_file(out)
    if model != "tiny":
        check_folder(model)
    from splitray.profiling.perplexity import PerplexityRequest, run, single, single_cut
    from splitray.profiling.sweep import SweepRequest, sweep
    from splitray.report.quality import quality_tables

    codecs, channels, placements = codec or ["none"], channel or ["none"], placement or []
    console = Console(highlight=False)
    scoring: dict[str, Any] = {
        "model": model, "text": text, "dtype": dtype, "seed": seed, "window": window, "stride": stride,
        "tokens": tokens, "masks": masks,
    }  # fmt: skip
    if out is not None:
        wanted = SweepRequest(**scoring, out=out, cuts=cut, placements=placements, channels=channels, codecs=codecs)
        with stdout_kept(as_json), result_file(out), bar(Console(stderr=True), "Measuring") as tell:
            measured = sweep(wanted, tell=tell)
        if as_json:
            print_json(measured.document())
            return
        for table in quality_tables(measured):
            console.print(table)
        return
    request = PerplexityRequest(
        **scoring, cut=single_cut(cut), placement=single("placement", placements),
        codec=single("codec", codecs) or "none", channel=single("channel", channels) or "none", weights=weights,
    )  # fmt: skip
    with stdout_kept(as_json), progress(Console(stderr=True), "Reading the model") as spin:
        document = run(request, progress=spin)
    if as_json:
        print_json(document)
        return
    where = f"split, codec {document['codec']}, channel {document['channel']}"
    whole = document["placement"] is None or document["cut"] is None and not placements
    where = "one device" if whole else where
    where += "" if document["weights"] == "float32" else f", {document['weights']} weights"
    console.print(f"perplexity {document['perplexity']:.4f} over {document['tokens']:,} tokens ({where})")
