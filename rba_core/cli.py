"""`rba`: refine, align, crop, stitch, demo, bench, report, train, convert, download."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import InputError
from .imageio import LARGEST, Picture, check_output, read_image, read_mask, write_image, write_mask


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except InputError as error:
        print(f"rba: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "the same command goes on from here" if options.command in (bench_run, download) else "nothing was written"
        print(f"rba: cancelled, {kept}", file=sys.stderr)
        return 130
    return 0


def refine(options) -> None:
    from .pipeline import believed, refine_by_align

    check_output(options.output)
    if options.save_correspondence:
        check_output(options.save_correspondence)
    picture = read_image(options.image)
    mask, references, reference_masks = _inputs(options)
    if options.save_correspondence and len(references) > 1:
        raise InputError("save-correspondence", "has one picture for several references", "leave it out, or give one reference")
    model = _load(options)
    settings = _settings(options)
    started = time.perf_counter()
    with _bar("refine") as progress:
        refined = refine_by_align(model, picture.rgb, mask, references, reference_masks, settings=settings, seed=options.seed, progress=progress)
    seconds = time.perf_counter() - started
    write_image(options.output, refined.image, like=picture)
    regions = [region for region in refined.regions if region is not None]
    if options.save_correspondence:
        union = torch.stack([region.mask for region in regions]).amax(0) if regions else torch.zeros(references[0].shape[-2:])
        write_mask(options.save_correspondence, union)
    count = len(refined.matches)
    fell_back = 0 if options.single_stage else count - len(regions)
    if fell_back:
        print(f"rba: alignment found nothing for {fell_back} of {count} artifacts; the whole reference guided them", file=sys.stderr)
    doubted = [match for match in refined.matches if match.collage is not None and believed(match.collage, settings) is None]
    if doubted:
        print(f"rba: image and reference do not agree around {len(doubted)} of {count} artifacts; they were redrawn without the reference's pixels, look at them", file=sys.stderr)
    confidences = [None if confidence is None else round(confidence, 4) for confidence in refined.confidences]
    if options.json:
        boxes = [[r.box.x, r.box.y, r.box.width, r.box.height] if r else None for r in refined.regions]
        chosen = [match.reference for match in refined.matches]
        print(json.dumps({"output": str(options.output), "seconds": round(seconds, 3), "seed": options.seed, "regions": boxes, "references": chosen, "confidences": confidences, "fell_back": fell_back}))
    else:
        told = "" if None in confidences else f", confidence {min(confidences):.2f}"
        print(f"{options.output}  ({count} artifact{'s' * (count > 1)}{told}, {seconds:.1f} s)")


def align(options) -> None:
    from .alignment import correspondence
    from .collage import in_the_image
    from .overlay import draw_matches, overlay
    from .pipeline import Settings, aligner_of, best_match, checked_references
    from .postprocessing import CleaningSettings
    from .reference_encoding import encode_reference
    from .zoom_crop import crop_for

    for path in filter(None, (options.output, options.raw, options.overlay, options.matches, options.warped)):
        check_output(path)
    if options.no_register and (options.matches or options.warped):
        raise InputError("no-register", "leaves no matches to show", "leave it out, or --matches and --warped")
    image = read_image(options.image).rgb
    mask, references, reference_masks = _inputs(options)
    if options.raw and len(references) > 1:
        raise InputError("raw", "shows one reference", "give one, or leave it out")
    references, object_masks = checked_references(image, mask, references, reference_masks)
    model = _load(options)
    wholes = [encode_reference(model, reference, object_mask) for reference, object_mask in zip(references, object_masks)]
    settings = Settings(
        layer=options.layer, timestep=options.timestep, noise_level=options.noise_level, cleaning=CleaningSettings(threshold=options.threshold),
        aligner=options.aligner, dense=not options.no_dense, levels=options.levels, register=not options.no_register, min_confidence=options.min_confidence,
    )  # fmt: skip
    if options.raw:
        crop = crop_for(model, image, mask, model.config.alignment_context)
        aligner = aligner_of(model, settings, options.seed)
        whole = aligner.encode(references[0], wholes[0].mask)
        soft = whole.to_reference(correspondence(aligner.attend(crop, whole), crop.mask))
        write_mask(options.raw, soft / soft.max().clamp(min=1e-9))
    closer = crop_for(model, image, mask)
    match = best_match(model, image, mask, closer, references, wholes, settings, options.seed)
    reference, region = references[match.reference], match.region
    write_mask(options.output, region.mask)
    if options.overlay:
        write_image(options.overlay, overlay(reference, region.soft, region.mask))
    if options.matches:
        write_image(options.matches, draw_matches(image, closer, reference, match.collage))
    if options.warped:
        laid, shown = in_the_image(match.collage, closer.box, *mask.shape)
        write_image(options.warped, laid, like=Picture(laid, (shown * 255).byte().numpy()))
    chosen = f"reference {match.reference + 1}, " if len(references) > 1 else ""
    told = f", confidence {match.collage.confidence:.2f}" if match.collage else ""
    print(f"{options.output}  ({chosen}box {region.box.x},{region.box.y} {region.box.width} x {region.box.height}{told})")


def crop(options) -> None:
    from .pipeline import check_mask
    from .zoom_crop import zoom_crop

    for path in filter(None, (options.output, options.crop_mask)):
        check_output(path)
    if not 16 <= options.size <= LARGEST:
        raise InputError("size", f"is {options.size}", f"use 16 to {LARGEST}")
    image, mask = read_image(options.image).rgb, read_mask(options.mask)
    check_mask("mask", mask, "image", image)
    cut = zoom_crop(image, mask, options.size, context=options.context)
    write_image(options.output, cut.image)
    if options.crop_mask:
        write_mask(options.crop_mask, cut.mask)
    print(f"{options.output}  (box {cut.box.x},{cut.box.y} {cut.box.width} x {cut.box.height}, at {options.size} x {options.size})")


def stitch(options) -> None:
    from .drift import Drift, estimate_drift, undo_drift
    from .pipeline import check_mask
    from .stitch import stitch as put_back
    from .zoom_crop import crop_box

    check_output(options.output)
    picture, mask, redrawn = read_image(options.image), read_mask(options.mask), read_image(options.redrawn, "redrawn").rgb
    check_mask("mask", mask, "image", picture.rgb)
    height, width = redrawn.shape[1:]
    if min(height, width) < 16 or abs(height - width) > 0.02 * width:
        raise InputError("redrawn", f"is {width} x {height}, the crop is square", "give all of the crop, redrawn")
    box = crop_box(mask, options.context, multiple=8)
    drift = Drift()
    if not options.no_drift_correction:
        drift = estimate_drift(redrawn, box.crop(picture.rgb), box.crop(mask[None])[0])
    stitched = put_back(picture.rgb, mask, undo_drift(redrawn, drift), box, feather=options.feather, colour_match=not options.no_colour_match)
    write_image(options.output, stitched, like=picture)
    told = f"shift {drift.shift[0]:.1f}, {drift.shift[1]:.1f} px, zoom {drift.zoom:.3f} undone" if drift.moved else "no shift, no zoom found"
    print(options.output if options.no_drift_correction else f"{options.output}  ({told})")


def demo(options) -> None:
    from .demo import run

    with _bar("refine") as progress:
        run(_load(options), Path(options.output), seed=options.seed, progress=progress)


def bench_run(options) -> None:
    from .bench.judges import load_judges, parse_judges
    from .bench.report import contact_sheet_of, write_report
    from .bench.run import Share, format_table, run, write_json

    folder = _folder(options.out)
    names = [Path(given).resolve().name for given in options.sets]
    if len(set(names)) < len(names):
        raise InputError("sets", f"have one name twice: {', '.join(names)}", "rename a folder: results are filed by the sets' names")
    share = Share.of_this_process()
    model = _load(options)
    methods, weights = _methods(options, model)
    judges, unavailable = load_judges(parse_judges(options.judges), model.device)
    for name, reason in unavailable.items():
        print(f"{name}: not available: {reason}", file=sys.stderr)
    for given, name in zip(options.sets, names):
        with _bar(f"bench {name}", "item", shown=share.rank == 0) as progress:
            results = run(given, methods, model, folder / name, judges, weights, limit=options.limit, seed=options.seed, share=share, progress=progress)
        if results is None:
            continue
        target = folder / f"{name}.json"
        write_json(target, results | {"unavailable": unavailable, "model": Path(options.model).name})
        contact_sheet_of(results, target)
        print(format_table(results), end="\n\n")
        if results["failed"]:
            print(f"{len(results['failed'])} outcomes failed and are left out, the first: {results['failed'][0]['method']} on {results['failed'][0]['id']}: {results['failed'][0]['problem']}\n")
    if share.rank == 0:
        write_report([folder / f"{name}.json" for name in names], folder / "report.html")
        print(folder / "report.html")


def bench_grid_search(options) -> None:
    from .bench.grid_search import draw, grid_search, write_choice
    from .bench.run import write_json

    try:
        steps_of_t = [int(value) for value in options.steps_of_t.split(",")]
    except ValueError as error:
        raise InputError("timesteps", f"are {options.steps_of_t!r}", "give whole numbers with commas between") from error
    folder = _folder(options.out)
    with _bar("grid search", "pass") as progress:
        results = grid_search(options.set, _load(options), steps_of_t, options.limit, options.seed, progress)
    write_json(folder / "grid.json", results | {"model": Path(options.model).name})
    draw(results, folder)
    best = results["best"]
    print(f"{folder}  (t = {best['timestep']}, layer {best['layer']}: mean IoU {best['miou']:.3f} over {results['n']} items)")
    if options.write:
        print(write_choice(options.model, best))


def bench_steps(options) -> None:
    from .bench.steps import NEAR, compare_steps, steps_table

    _check_json(options)
    with _bar("steps", "outcome") as progress:
        results = compare_steps(options.set, _load(options), limit=options.limit, seed=options.seed, progress=progress)
    _tell(steps_table(results), f"{results['fewest']} steps stay within {NEAR:.0%} of the most in every metric")
    _keep(results | {"model": Path(options.model).name}, options)


def bench_doubt(options) -> None:
    from .bench.doubt import doubt, doubt_table

    _check_json(options)
    with _bar("doubt", "item") as progress:
        results = doubt(options.set, _load(options), limit=options.limit, seed=options.seed, progress=progress)
    _tell(doubt_table(results), f"the right reference has more confidence than the wrong object's in {results['told']:.0%}")
    _keep(results | {"model": Path(options.model).name}, options)


def bench_calibrate(options) -> None:
    from .bench.calibration import calibrate

    with _bar("calibrate", "item") as progress:
        fitted = calibrate(options.sets, _load(options), limit=options.limit, seed=options.seed, progress=progress)
    print(f"CALIBRATION = ({', '.join(f'{weight:.2f}' for weight in fitted['weights'])}), {fitted['constant']:.2f}")
    for bar, shares in fitted["below"].items():
        print(f"below {bar:g}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))


def bench_study(options) -> None:
    from .bench.study import outcomes, write_study

    model = _load(options)
    methods, _ = _methods(options, model)
    with _bar("study", "item") as progress:
        results = outcomes(options.set, methods, model, options.limit, options.seed, progress)
        key = write_study(options.output, results, options.seed, set=Path(options.set).resolve().name, model=Path(options.model).name)
    folder = Path(options.output)
    print(f"{folder}  ({len(key['trials'])} trials; for the participants: {folder / 'page'}; to keep: {folder / 'key.json'})")


def bench_study_table(options) -> None:
    from .bench.study import NOTE, study_table, tally

    _check_json(options)
    results = tally(options.key, options.answers)
    _tell(study_table(results), NOTE)
    _keep(results, options)


def bench_speed(options) -> None:
    from .bench.speed import measure_speed, speed_sentences, speed_table, speed_title

    _check_json(options)
    with _bar("speed", "run") as progress:
        results = measure_speed(
            options.size, **_machine(options), steps=options.steps, repeats=options.repeats, warm_up=options.warm_up, compile=options.compile,
            channels_last=options.channels_last, progress=progress,
        )  # fmt: skip
    print(speed_title(results), end="\n\n")
    _tell(speed_table(results), "\n".join(speed_sentences(results)))
    _keep(results, options)


def bench_memory(options) -> None:
    from .bench.memory import measure_memory, memory_setting, memory_tables, memory_title
    from .bench.report import markdown_table

    _check_json(options)
    results = measure_memory(options.size)
    parts, settings = memory_tables(results)
    print(memory_title(results), "\n".join(markdown_table(settings)), sep="\n\n", end="\n\n")
    _tell(parts, memory_setting(results))
    _keep(results, options)


def report(options) -> None:
    from .bench.report import write_report

    write_report(options.results, check_output(options.output, lossless=False))
    print(options.output)


def bench_make(options) -> None:
    from .bench.synthetic import make_set
    from .data.textures import load_photos

    photos = load_photos(options.photos) if options.photos else ()
    make_set(options.folder, options.n, options.seed, options.split, options.size, photos, options.light, options.workers)
    print(f"{options.folder}  ({options.n} items)")


def bench_caption(options) -> None:
    from .bench.captions import Captioner, caption_set

    captioner = Captioner(options.blip2, **_machine(options))
    with _bar("caption", "item") as progress:
        written = caption_set(options.set, captioner, options.limit, progress)
    print(f"{Path(options.set) / 'index.jsonl'}  ({written} captions)")


def train(options) -> None:
    from .training.loop import Stopped
    from .training.train import train

    if options.steps is not None and options.steps < 1:
        raise InputError("steps", f"is {options.steps}", "use 1 or more")
    legs = options.legs.split(",") if options.legs else None
    try:
        train(options.config, Path(options.output), photos=options.photos, legs=legs, steps=options.steps)
    except Stopped as stopped:
        print(f"rba: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None


def _methods(options, model):
    """The methods asked for, and where those with weights of their own have them from, both by name."""
    from .bench.methods import load_methods

    weights = {}
    for pair in options.weights:
        name, _, path = pair.partition("=")
        if not path:
            raise InputError("weights", f"are given as {pair!r}", "write NAME=PATH, say paint-by-example=FOLDER")
        weights[name] = path
    return load_methods([name.strip() for name in options.methods.split(",")], weights, model.device, model.dtype), weights


def _folder(given: str) -> Path:
    folder = Path(given)
    if folder.is_file():
        raise InputError("out", f"{folder} is a file", "give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(options) -> None:
    from .downloads import DOWNLOADS, Download, known, models_folder
    from .downloads import download as fetch

    if options.name is None and options.url is None:
        for name, pin in DOWNLOADS.items():
            print(f"{name}: {pin.what}, to {pin.folder}/{pin.file}\n{pin}\n")
        return
    if options.url is not None:
        if options.name or not options.sha256 or not options.size:
            raise InputError("url", "stands alone", "give --sha256 and --size with it, as the publisher states them, and no NAME")
        pin = Download(options.url, options.size, options.sha256.lower(), options.url.split("?")[0].rsplit("/", 1)[-1])
    else:
        pin = known(options.name)
    folder = Path(options.to) if options.to else models_folder()
    if folder is None:
        raise InputError("to", "is missing, and this pack lies in no ComfyUI", "give --to DIR")
    print(pin)
    with _bar(pin.file, "B") as progress:
        print(fetch(pin, folder if options.to else folder / pin.folder, progress))


def convert_sd15(options) -> None:
    from .conversion import import_sd15

    aside = import_sd15(options.checkpoint, options.folder, options.dinov2, mlp=options.mlp, seed=options.seed)
    told = ", ".join(f"{count} {name}" for name, count in aside.items())
    print(f"{options.folder}  (left aside: {told or 'nothing'})")


def convert_anydoor(options) -> None:
    from .conversion import import_anydoor

    aside = import_anydoor(options.checkpoint, options.folder)
    told = ", ".join(f"{count} {name}" for name, count in aside.items())
    print(f"{options.folder}  (left aside: {told or 'nothing'})")


def convert_to_ldm(options) -> None:
    from .conversion import export_ldm
    from .model import RefineByAlign

    for path in export_ldm(RefineByAlign.load(options.model), options.file):
        print(path)


def _inputs(options) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    pictures = [read_image(path, "reference") for path in options.reference]
    masks = [read_mask(path, "reference mask") for path in options.reference_mask or ()]
    if not masks:  # a cut-out product shot has its object's mask as alpha
        cut_out = [picture.alpha is not None and (picture.alpha < 128).any() for picture in pictures]
        masks = [torch.from_numpy(picture.alpha > 127).float() if cut else None for picture, cut in zip(pictures, cut_out)]
    return read_mask(options.mask), [picture.rgb for picture in pictures], masks


def _settings(options):
    from .pipeline import Settings
    from .postprocessing import CleaningSettings

    return Settings(
        single_stage=options.single_stage,
        on_flat=options.on_flat,
        one_crop=options.one_crop,
        layer=options.layer,
        timestep=options.timestep,
        noise_level=options.noise_level,
        cleaning=CleaningSettings(threshold=options.threshold),
        aligner=options.aligner,
        dense=not options.no_dense,
        levels=options.levels,
        register=not options.no_register,
        min_confidence=options.min_confidence,
        strength=options.strength,
        detail_transfer=options.detail_transfer,
        steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        context=options.context,
        feather=options.feather,
        colour_match=not options.no_colour_match,
    )


def _load(options):
    from .model import RefineByAlign

    return RefineByAlign.load(options.model, **_machine(options), low_memory=options.low_memory)


def _machine(options) -> dict:
    """Device and dtype, as `RefineByAlign.load` takes them."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", f"{device!r} is not available here", "use cpu, cuda, cuda:N or mps") from error
    return {"device": device, "dtype": dtype}


def _check_json(options) -> None:
    if options.json:
        check_output(options.json, lossless=False)


def _tell(table: list[list[str]], words: str) -> None:
    from .bench.report import markdown_table

    print("\n".join(markdown_table(table)), words, sep="\n\n")


def _keep(results: dict, options) -> None:
    """For `rba report`, where a file was asked for."""
    from .bench.run import write_json

    if options.json:
        write_json(Path(options.json), results)


class _bar:
    """A progress bar for the pipeline's `progress`, shown once two seconds have passed."""

    def __init__(self, label: str, unit: str = "step", shown: bool = True):
        self.label, self.unit, self.shown = label, unit, shown

    def __enter__(self):
        self.bar = tqdm(desc=self.label, unit=self.unit, unit_scale=self.unit == "B", delay=2, disable=not self.shown)

        def progress(done: int, total: int) -> None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

        return progress

    def __exit__(self, *exception) -> None:
        self.bar.close()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="rba", description="Refine-by-Align: put right what an image generator got wrong, from a reference photo.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    machine.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"], help="precision (default: %(default)s)")

    model = argparse.ArgumentParser(add_help=False, parents=[machine])
    model.add_argument("--model", default="rba-tiny", help="a shipped model's name or a model folder (default: %(default)s)")
    model.add_argument("--low-memory", action="store_true", help="U-Net and encoder on the device only while they run, guidance in two passes: slower, for small GPUs")
    model.add_argument("--seed", type=int, default=0, help="same seed, same result (default: %(default)s)")

    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument("image", metavar="IMAGE", help="the generated image with the artifact")
    inputs.add_argument("mask", metavar="MASK", help="white over the artifact, same size as IMAGE")
    inputs.add_argument("reference", nargs="+", metavar="REFERENCE", help="a good photo of the object, any size; of several, each artifact takes the one it is found in most surely")
    inputs.add_argument("--reference-mask", action="append", metavar="M", help="white over the object in REFERENCE, once for each (default: its alpha, else the whole picture)")
    inputs.add_argument("--layer", type=int, help="cross-attention layer to align with, 0-15 by execution (default: the model's, 9)")
    noise = inputs.add_mutually_exclusive_group()
    noise.add_argument("--timestep", type=int, help="noise at alignment as a step of 50, 0 = the noisiest (default: the model's, 0)")
    noise.add_argument("--noise-level", type=float, metavar="S", help="noise at alignment as its standard deviation, 0-1")
    inputs.add_argument("--aligner", choices=["attention", "features"], default="attention", help="by the model's cross-attention (the paper), or by the likeness of its encoder's tokens (default: %(default)s)")
    inputs.add_argument("--no-dense", action="store_true", help="M* from the attention of the masked part alone (the paper), not from what all of the crop agrees on")
    inputs.add_argument("--levels", type=int, default=2, metavar="N", help="looks at the reference at most, each closer; 1 = the paper (default: %(default)s)")
    inputs.add_argument("--no-register", action="store_true", help="leave M* as attention gave it (the paper)")
    inputs.add_argument("--min-confidence", type=float, default=0.03, metavar="C", help="what the registration must reach to be used, 0-1 (default: %(default)s)")
    inputs.add_argument("--threshold", type=float, default=0.4, help="share of the map's peak that belongs to M* (default: %(default)s)")

    command = commands.add_parser("refine", parents=[inputs, model], help="redraw the masked part from the matching part of the reference")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="PNG, WebP (lossless), TIFF or BMP")
    command.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    command.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance, 1 = off (default: the model's)")
    command.add_argument("--scheduler", choices=["ddim", "ddpm", "dpm++", "unipc", "euler"], help="default: the model's")
    command.add_argument("--single-stage", action="store_true", help="no alignment: the whole reference guides (the paper's ablation)")
    command.add_argument("--on-flat", choices=["error", "single-stage"], default="error", help="what to do where alignment finds nothing (default: %(default)s)")
    command.add_argument("--strength", type=float, help="how far to depart from the registered reference, 0-1 (default: by confidence)")
    command.add_argument("--detail-transfer", type=float, default=1.0, metavar="A", help="how much of its fine detail to carry over, 0-1; 0 = the paper's refinement (default: %(default)s)")
    command.add_argument("--one-crop", action="store_true", help="redraw several artifacts in one crop, not one by one")
    command.add_argument("--context", type=float, help="side of the crop in sides of the mask (default: the model's)")
    command.add_argument("--feather", type=float, default=1.0, help="blend width inside the mask, pixels (default: %(default)s)")
    command.add_argument("--no-colour-match", action="store_true", help="do not match the tone of the surround")
    command.add_argument("--save-correspondence", metavar="FILE", help="write M* (at the reference's size)")
    command.add_argument("--json", action="store_true", help="print the outcome as JSON")
    command.set_defaults(command=refine)

    command = commands.add_parser("align", parents=[inputs, model], help="find the region of the reference that corresponds to the mask")
    command.add_argument("-o", "--output", required=True, metavar="MASK_OUT", help="M*, 8-bit, at the size of REFERENCE")
    command.add_argument("--raw", metavar="FILE", help="also write the unprocessed map, scaled to its peak")
    command.add_argument("--overlay", metavar="FILE", help="also write the reference with M* marked on it")
    command.add_argument("--matches", metavar="FILE", help="also write matched points, image and reference side by side")
    command.add_argument("--warped", metavar="FILE", help="also write the reference as it lies over IMAGE, transparent where it does not show the object")
    command.set_defaults(command=align)

    boxed = argparse.ArgumentParser(add_help=False)
    boxed.add_argument("image", metavar="IMAGE", help="the generated image with the artifact")
    boxed.add_argument("mask", metavar="MASK", help="white over the artifact, same size as IMAGE")
    boxed.add_argument("--context", type=float, default=2.0, help="side of the crop in sides of the mask, the same for crop and stitch (default: %(default)s)")

    command = commands.add_parser("crop", parents=[boxed], help="cut a square around the mask, to redraw it in any image editor")
    command.add_argument("-o", "--output", required=True, metavar="CROP", help="PNG, WebP (lossless), TIFF or BMP")
    command.add_argument("--crop-mask", metavar="FILE", help="also write the mask in the crop")
    command.add_argument("--size", type=int, default=1024, metavar="PX", help="side of CROP (default: %(default)s)")
    command.set_defaults(command=crop)

    command = commands.add_parser("stitch", parents=[boxed], help="put a crop that an editor redrew back into its image")
    command.add_argument("redrawn", metavar="REDRAWN", help="the redrawn CROP, of any size")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="PNG, WebP (lossless), TIFF or BMP")
    command.add_argument("--no-drift-correction", action="store_true", help="do not undo the shift, zoom and colour cast that the editor gave all of the crop")
    command.add_argument("--feather", type=float, default=1.0, help="blend width inside the mask, pixels (default: %(default)s)")
    command.add_argument("--no-colour-match", action="store_true", help="do not match the tone of the surround")
    command.set_defaults(command=stitch)

    command = commands.add_parser("demo", parents=[model], help="refine the sample that comes with the package")
    command.add_argument("-o", "--output", default="rba-demo", metavar="DIR", help="where the pictures go (default: %(default)s)")
    command.set_defaults(command=demo)

    benches = commands.add_parser("bench", help="make a benchmark set, measure methods on one").add_subparsers(required=True, metavar="WHAT")

    command = benches.add_parser("make", help="write a synthetic set, held out from training by its seeds")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("--split", default="test", choices=["test", "validation"], help="they share no seed (default: %(default)s)")
    command.add_argument("--n", type=int, default=200, help="items (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="same seed, same set (default: %(default)s)")
    command.add_argument("--size", type=int, default=384, metavar="PX", help="side of the pictures (default: %(default)s)")
    command.add_argument("--photos", metavar="DIR", help="photos to take textures from beside the procedural ones")
    command.add_argument("--light", type=float, default=1.0, metavar="X", help="difference in light and colour between the views, in shares of the usual (default: %(default)s)")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one core each (default: %(default)s)")
    command.set_defaults(command=bench_make)

    command = benches.add_parser("caption", parents=[machine], help="write the captions that a set lacks, for CLIP-T")
    command.add_argument("set", metavar="SET", help="folder with index.jsonl")
    command.add_argument("--blip2", required=True, metavar="FOLDER", help="a Blip2ForConditionalGeneration, in the layout of transformers")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.set_defaults(command=bench_caption)

    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--weights", action="append", default=[], metavar="NAME=PATH", help="folder, in the layout of diffusers or, of mimicbrush, its authors', of a method with weights of your own; once for each")

    command = benches.add_parser("run", parents=[model, weights], help="measure methods on benchmark sets; goes on where it stopped, and under `accelerate launch` shares the work")
    command.add_argument("sets", nargs="+", metavar="SET", help="folder with index.jsonl")
    command.add_argument("--methods", default="none,telea,sift-warp,paper,detail", help="comma-separated; also single-stage, no-reference, features, unregistered, oracle, oracle-warp, and with weights of your own paint-by-example, anydoor, mimicbrush, sd-inpainting, cross-image-attention, dift (default: %(default)s)")
    command.add_argument("--judges", default="kgain", metavar="NAME[=PATH],…", help="further metrics: kgain, ocr, and by weights of yours, from PATH or the hub's cache, clip, dino and lpips (default: %(default)s)")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items of each")
    command.add_argument("-o", "--out", default="rba-bench", metavar="DIR", help="report.html, a JSON file and a contact sheet for each set, and what is kept of each item (default: %(default)s)")
    command.set_defaults(command=bench_run)

    command = benches.add_parser("grid-search", parents=[model], help="find the timestep and layer to align with (Algorithm 1); use the validation split")
    command.add_argument("set", metavar="SET", help="folder with index.jsonl; items need correspondence")
    command.add_argument("--steps-of-t", default="0,6,12,18,24,30,36,42,48", metavar="T,T…", help="steps of 50, 0 = the noisiest (default: %(default)s)")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.add_argument("--out", required=True, metavar="DIR", help="grid.json, heat_map.png and curves.png go here")
    command.add_argument("--write", action="store_true", help="make the best pair the model folder's default")
    command.set_defaults(command=bench_grid_search)

    command = benches.add_parser("steps", parents=[model], help="how many denoising steps are enough")
    command.add_argument("set", metavar="SET", help="folder with index.jsonl; items need truth")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.add_argument("--json", metavar="FILE", help="write all figures")
    command.set_defaults(command=bench_steps)

    command = benches.add_parser("doubt", parents=[model], help="pairs made to fail: does the confidence tell?")
    command.add_argument("set", metavar="SET", help="a benchmark set with correspondence")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.add_argument("--json", metavar="FILE", help="write all figures")
    command.set_defaults(command=bench_doubt)

    command = benches.add_parser("calibrate", parents=[model], help="fit the confidence anew, to right references and ones made to fail")
    command.add_argument("sets", nargs="+", metavar="SET", help="sets with flow of the validation split")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items of each")
    command.set_defaults(command=bench_calibrate)

    command = benches.add_parser("study", parents=[model, weights], help="write a user study: a page where people choose between the results of two methods")
    command.add_argument("set", metavar="SET", help="folder with index.jsonl")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder: page/ for the participants, key.json to keep")
    command.add_argument("--methods", default="detail,paper", help="comma-separated, as of bench run; every pair is compared (default: %(default)s)")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.set_defaults(command=bench_study)

    command = benches.add_parser("study-table", help="what the participants of a user study preferred")
    command.add_argument("answers", nargs="+", metavar="ANSWERS", help="the files that they saved")
    command.add_argument("--key", required=True, metavar="FILE", help="key.json of the study")
    command.add_argument("--json", metavar="FILE", help="write all figures")
    command.set_defaults(command=bench_study_table)

    command = benches.add_parser("speed", parents=[machine], help="how long the parts of the method take, and how much of it is overhead")
    command.add_argument("--size", default="tiny", metavar="S", help="tiny, the shipped model; sd15, sd21 or anydoor at full size with random weights (default: %(default)s)")
    command.add_argument("--steps", type=int, metavar="N", help="denoising steps of the refinement (default: the model's)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds, of which the medians are told (default: %(default)s)")
    command.add_argument("--warm-up", type=int, default=1, metavar="N", help="rounds before them that do not count; 0 where a round takes minutes (default: %(default)s)")
    command.add_argument("--compile", action="store_true", help="also with torch.compile of the U-Net")
    command.add_argument("--channels-last", action="store_true", help="also with the model in that memory format")
    command.add_argument("--json", metavar="FILE", help="write all figures, machine and versions")
    command.set_defaults(command=bench_speed)

    command = benches.add_parser("memory", help="what memory the method takes at most, and which cards have it; nothing is computed")
    command.add_argument("--size", default="sd15", metavar="S", help="as of bench speed (default: %(default)s)")
    command.add_argument("--json", metavar="FILE", help="write all figures")
    command.set_defaults(command=bench_memory)

    command = commands.add_parser("report", help="write a page, .html or .md, from what bench run, doubt, speed, memory, grid-search and steps wrote")
    command.add_argument("results", nargs="+", metavar="JSON", help="files, or folders with such files")
    command.add_argument("-o", "--output", required=True, metavar="FILE")
    command.set_defaults(command=report)

    command = commands.add_parser("train", help="train a model: encoder, autoencoder, then U-Net and MLP; resumes where it stopped")
    command.add_argument("--config", default="rba-tiny", metavar="TOML", help="a plan, or a shipped one's name: rba-tiny, own-photos, sd1x (default: %(default)s)")
    command.add_argument("-o", "--output", default="training", metavar="DIR", help="checkpoints and the model folder go here (default: %(default)s)")
    command.add_argument("--photos", metavar="DIR", help="photos to train on beside the procedural products")
    command.add_argument("--legs", help="comma-separated: encoder,autoencoder,refiner (default: the plan's)")
    command.add_argument("--steps", type=int, metavar="N", help="of each leg, instead of the plan's")
    command.set_defaults(command=train)

    command = commands.add_parser("download", help="fetch weights from their publishers, pinned and checked; without NAME, what there is")
    command.add_argument("name", nargs="?", metavar="NAME")
    command.add_argument("--to", metavar="DIR", help="default: the folder of models of the ComfyUI that this pack lies in")
    command.add_argument("--url", help="instead of NAME: another file")
    command.add_argument("--sha256", metavar="HEX", help="of that file")
    command.add_argument("--size", type=int, metavar="BYTES", help="of that file")
    command.set_defaults(command=download)

    converts = commands.add_parser("convert", help="make a model folder of Stable Diffusion 1.5 and DINOv2, or of AnyDoor, or the way back").add_subparsers(required=True, metavar="WHAT")

    command = converts.add_parser("sd15", help="the start of training, from Stable Diffusion 1.5 or its inpainting version")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a .safetensors or .ckpt file, or a folder in the layout of diffusers")
    command.add_argument("folder", metavar="DIR", help="the model folder, new")
    command.add_argument("--dinov2", required=True, metavar="SOURCE", help="a folder of transformers, or a file of it, of ComfyUI's CLIP_VISION or of the original repository (.pth)")
    command.add_argument("--mlp", metavar="FILE", help="the .mlp.safetensors that to-ldm wrote (default: an untrained MLP)")
    command.add_argument("--seed", type=int, default=0, help="of the untrained MLP (default: %(default)s)")
    command.set_defaults(command=convert_sd15)

    command = converts.add_parser("anydoor", help="AnyDoor, for both stages, as it is")
    command.add_argument("checkpoint", metavar="CKPT", help="its .ckpt, or a .safetensors with the same names; mapped, not read into memory")
    command.add_argument("folder", metavar="DIR", help="the model folder, new")
    command.set_defaults(command=convert_anydoor)

    command = converts.add_parser("to-ldm", help="U-Net and autoencoder as ComfyUI loads a checkpoint; DINOv2 and MLP beside it")
    command.add_argument("model", metavar="MODEL", help="a model folder of the config sd1x")
    command.add_argument("file", metavar="FILE", help=".safetensors; FILE.dinov2.safetensors and FILE.mlp.safetensors are written too")
    command.set_defaults(command=convert_to_ldm)
    return top


if __name__ == "__main__":
    sys.exit(main())
