"""`python -m mpk_dynamo`: explain what happens to a model, time, profile and run it, survey families, list options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when an accuracy gate fails; 2 for a mistake in the command or its values; 130 after Ctrl-C."""
    from ..errors import LaunchError, OptionError

    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OptionError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mpk_dynamo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    explain = commands.add_parser("explain", help="what is captured, the task program, the kernel's resources")
    _model_arguments(explain)
    explain.add_argument("--target", default="", help="GPU or architecture to build for, e.g. h200 or sm_90a")
    explain.add_argument("--workers", type=int, default=0, help="default: one per SM of the target")
    explain.add_argument("--dump", default="", metavar="FOLDER", help="write every stage as text")
    explain.add_argument("--profile", default="", metavar="FILE", help="figures of `profile --json`, to compare with")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser("bench", help="time of a decode step against eager and Inductor, with accuracy gate")
    _model_arguments(bench)
    bench.add_argument("--against", nargs="*", default=None, metavar="WHAT", help="default: eager, Inductor")
    bench.add_argument("--steps", type=int, default=24, help="back-to-back steps per repeat (at least 20)")
    bench.add_argument("--repeats", type=int, default=7, help="repeats, of which the median counts (at least 5)")
    bench.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: accuracy alone, no times")
    bench.add_argument("--e2e", action="store_true", help="time generate() instead: loop, HF eager, HF with Inductor")
    bench.add_argument("--new", type=int, default=512, help="new tokens of --e2e (the slope over them counts)")
    bench.add_argument("--sample", action="store_true", help="with --e2e: temperature 0.8, top-k 50, top-p 0.95")
    bench.add_argument("--no-kernel", action="store_true", help="with --e2e: do not compile and time the step alone")
    bench.add_argument(
        "--seconds", type=float, default=15.0, help="with --e2e: how long the repeats of each may take; a slow one "
        "makes fewer tokens",
    )  # fmt: skip
    bench.add_argument("--energy", action="store_true", help="with --e2e: energy per token over 20 s of each")
    bench.add_argument("--json", default="", metavar="FILE", help="write all figures; - for standard output")
    bench.set_defaults(run=_bench)

    profile = commands.add_parser("profile", help="timeline of a decode step: where its time goes, task by task")
    _model_arguments(profile)
    profile.add_argument("--out", default="", metavar="FILE", help="write a Perfetto trace (.json or .json.gz)")
    profile.add_argument("--json", default="", metavar="FILE", help="write all figures; - for standard output")
    profile.add_argument("--steps", type=int, default=5, help="steps to record, of which the median is shown")
    profile.add_argument("--predict", action="store_true", help="simulate the step even where a GPU is")
    profile.add_argument("--target", default="", help="GPU to predict for, e.g. h200")
    profile.add_argument("--workers", type=int, default=0, help="default: one per SM")
    profile.set_defaults(run=_profile)

    coverage = commands.add_parser("coverage", help="model families: what is captured, with which accuracy")
    coverage.add_argument("--family", nargs="*", default=[], metavar="NAME", help="default: all of families.py")
    coverage.add_argument("--batch", nargs="*", type=int, default=[1, 3, 8], metavar="B")
    coverage.add_argument("--markdown", action="store_true", help="as docs/coverage.md")
    coverage.add_argument("--target", default="sm_90a", help="GPU or architecture that programs are generated for")
    coverage.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the models run")
    coverage.add_argument("--published", action="store_true", help="widths of published checkpoints, two layers")
    coverage.add_argument("--jobs", type=int, default=0, help="processes at once; default: half of the CPUs")
    coverage.add_argument("--timeout", type=int, default=900, metavar="S", help="bound of one family, in seconds")
    coverage.set_defaults(run=_coverage)

    generate = commands.add_parser("generate", help="answer prompts with a local model, many steps per launch")
    generate.add_argument("--model", required=True, metavar="FOLDER", help="model and tokenizer, as saved by HF")
    generate.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="one or several, decoded together")
    generate.add_argument("--plain", action="store_true", help="do not put prompts into the model's chat template")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--max-cache", type=int, default=0, metavar="N", help="default: what this call needs")
    generate.add_argument("--stream", action="store_true", help="print the text as it comes")
    generate.add_argument("--sample", action="store_true", help="sample; implied by the next four")
    generate.add_argument("--temperature", type=float)
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--min-p", type=float)
    generate.add_argument("--repetition-penalty", type=float)
    generate.add_argument("--seed", type=int, help="of the random numbers")
    generate.add_argument("--steps", type=int, default=0, help="decode steps per launch; 0: as many as keep it short")
    generate.add_argument("--device", default="", choices=("cuda", "cpu"), help="default: cuda where there is one")
    generate.set_defaults(run=_generate)

    soak = commands.add_parser("soak", help="generate for minutes, everything several times, compared bit by bit")
    soak.add_argument("--model", default="qwen3-0.6b", help="a built-in shape (random weights) or a local folder")
    soak.add_argument("--layers", type=int, default=0, help="keep only so many layers of a built-in shape")
    soak.add_argument("--minutes", type=float, default=10, help="after the programs are made")
    soak.add_argument("--batch", nargs="+", type=int, default=[1, 3, 8], metavar="B", help="sizes to draw from")
    soak.add_argument("--max-cache", type=int, default=1024, metavar="N", help="most tokens of prompt and answer")
    soak.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    soak.add_argument("--round", type=int, metavar="N", help="only this round of the seed, to repeat a problem")
    soak.add_argument("--shared", action="store_true", help="other processes use the GPU: do not judge its memory")
    soak.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the reference executor")
    soak.add_argument("--json", default="", metavar="FILE", help="write all figures; - for standard output")
    soak.set_defaults(run=_soak)

    mutate = commands.add_parser("mutate", help="does the verifier refuse broken programs? (docs/verification.md)")
    mutate.add_argument("--model", nargs="*", default=[], metavar="FAMILY:BATCH", help="default: eight of families.py")
    mutate.add_argument("--mutants", type=int, default=12000, help="at least so many in all")
    mutate.add_argument("--seed", type=int, default=0)
    mutate.add_argument("--show", type=int, default=5, help="survivors to print per kind")
    mutate.add_argument("--target", default="sm_90a", help="GPU or architecture that programs are generated for")
    mutate.add_argument("--json", default="", metavar="FILE", help="write all counts and survivors")
    mutate.set_defaults(run=_mutate)

    options = commands.add_parser("options", help="the options of the backend")
    options.set_defaults(run=_options)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a built-in shape (random weights) or a local folder")
    parser.add_argument("--layers", type=int, default=0, help="keep only so many layers of a built-in shape")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the cache before the first step")
    parser.add_argument("--max-cache", type=int, default=0, help="tokens that fit the cache; default: prompt + 512")


def _explain(arguments: argparse.Namespace) -> int:
    from .decoder import Decoder
    from .explain import explain
    from .models import load

    # sizes are all that lowering needs: nothing is allocated
    model = load(arguments.model, device="meta", layers=arguments.layers)
    cache = arguments.max_cache or arguments.prompt + 512
    decoder = Decoder(model, batch=arguments.batch, prompt=arguments.prompt, max_cache=cache, steps=1)
    found = explain(
        model,
        **decoder.steps[0],
        target=arguments.target,
        workers=arguments.workers,
        dump_dir=arguments.dump,
        profile=arguments.profile,
        live=arguments.prompt,
    )
    print(f"{arguments.model}: decode step, batch {arguments.batch}, cache of {cache} tokens")
    print(found)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.e2e:
        from .end_to_end import run

        arguments.against = ["eager", "inductor"] if arguments.against is None else arguments.against
        return run(arguments)
    from .bench import run

    arguments.against = ["eager", "inductor-reduce-overhead"] if arguments.against is None else arguments.against
    return run(arguments)


def _profile(arguments: argparse.Namespace) -> int:
    from .profile import run

    return run(arguments)


def _coverage(arguments: argparse.Namespace) -> int:
    from .coverage import run
    from .families import FAMILIES, PARTIAL

    known = [*FAMILIES, *([] if getattr(arguments, "published", False) else PARTIAL)]
    unknown = sorted(set(arguments.family) - set(known))
    if unknown:
        from ..errors import OptionError

        raise OptionError(f"no family {', '.join(unknown)}", remedy=f"known families: {', '.join(known)}")
    return run(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    from .generate import run

    return run(arguments)


def _soak(arguments: argparse.Namespace) -> int:
    from .soak import run

    return run(arguments)


def _mutate(arguments: argparse.Namespace) -> int:
    from .mutation.command import run

    return run(arguments)


def _options(arguments: argparse.Namespace) -> int:
    from ..settings import table

    print(table(), end="")
    return 0
